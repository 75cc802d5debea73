//! The gRPC and HTTP faces.
