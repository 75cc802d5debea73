//! Settings: flags, environment, file, and their checks.
