//! The gRPC and HTTP faces.

pub mod admin;
