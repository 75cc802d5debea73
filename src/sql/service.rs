//! The gRPC face: every service of the etcd API, over TCP or over a pipe within the process.

mod auth;
mod cluster;
mod election;
mod kv;
mod lease;
mod limits;
mod lock;
mod maintenance;
mod peer_url;
mod session;
mod watch;
mod words;

use std::{future::Future, io};

use tokio::{io::DuplexStream, net::TcpListener};
use tonic::{
    service::Routes,
    transport::{Server, server::TcpIncoming},
};

use super::Engine;
use crate::{
    grpc,
    proto::{
        etcdserverpb::{
            auth_server::AuthServer, cluster_server::ClusterServer, kv_server::KvServer, lease_server::LeaseServer,
            maintenance_server::MaintenanceServer, watch_server::WatchServer,
        },
        v3electionpb::election_server::ElectionServer,
        v3lockpb::lock_server::LockServer,
    },
};

/// Bytes that a pipe within the process holds before its writer waits.
const PIPE: usize = 1 << 20;

/// Bytes in flight to one stream, and to all of a connection, before the reader has to keep up.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// The implementation of all services.
#[derive(Clone)]
struct Services {
    engine: Engine,
}

impl Engine {
    /// A connection to the store's gRPC face within the process. Must be called on a Tokio runtime.
    pub fn connect(&self) -> DuplexStream {
        let (client, server) = tokio::io::duplex(PIPE);
        let incoming = futures_util::stream::iter([Ok::<_, io::Error>(server)]);
        let serving = self.server().add_routes(self.routes()).serve_with_incoming(incoming);
        tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::debug!(%error, "a connection within the process ended");
            }
        });
        client
    }

    /// Serves the etcd API on `listener`. After `shutdown`, takes no more connections and returns once the open ones have
    /// finished; [`Engine::close`] ends the watches among them.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(
        &self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        self.server().add_routes(self.routes()).serve_with_incoming_shutdown(incoming, shutdown).await
    }

    fn server(&self) -> Server {
        Server::builder()
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(u32::MAX)
    }

    /// The gRPC face as a service of HTTP requests: for callers within the process that have a request at hand and want no
    /// connection in between.
    pub fn routes(&self) -> Routes {
        let services = Services { engine: self.clone() };
        let limit = grpc::largest_message(self.state().options.max_request_bytes);
        let routes = Routes::new(KvServer::new(services.clone()).max_decoding_message_size(limit))
            .add_service(WatchServer::new(services.clone()).max_decoding_message_size(limit))
            .add_service(LeaseServer::new(services.clone()).max_decoding_message_size(limit))
            .add_service(ClusterServer::new(services.clone()).max_decoding_message_size(limit))
            .add_service(MaintenanceServer::new(services.clone()).max_decoding_message_size(limit))
            .add_service(LockServer::new(services.clone()).max_decoding_message_size(limit))
            .add_service(ElectionServer::new(services.clone()).max_decoding_message_size(limit))
            .add_service(AuthServer::new(services).max_decoding_message_size(limit));
        words::in_etcds_words(routes)
    }
}
