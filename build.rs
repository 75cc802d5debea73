//! Generates the etcd v3 messages and services from `proto/`, with a proto compiler in Rust so that no protoc is needed.

use std::{error::Error, path::Path};

const PROTOS: [&str; 5] =
    ["etcd/kv.proto", "etcd/auth.proto", "etcd/rpc.proto", "etcd/lock.proto", "etcd/election.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, [Path::new("proto")])?;
    tonic_prost_build::configure().bytes(".").build_client(true).build_server(true).compile_fds(descriptors)?;
    Ok(())
}
