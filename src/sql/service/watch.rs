//! The Watch service.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Streaming};

use super::Services;
use crate::{
    proto::etcdserverpb::{WatchRequest, WatchResponse, watch_server::Watch},
    sql::watch,
};

/// Responses that wait for a client before its watchers do.
const BUFFER: usize = 64;

#[tonic::async_trait]
impl Watch for Services {
    type WatchStream = ReceiverStream<Result<WatchResponse, tonic::Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, tonic::Status> {
        let (responses, stream) = mpsc::channel(BUFFER);
        tokio::spawn(watch::serve(self.engine.clone(), request.into_inner(), responses));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
