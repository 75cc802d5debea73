//! The store within the process as an upstream: requests are handed to its gRPC face without a connection in between.

use std::{convert::Infallible, sync::Arc};

use http::{Request, Response};
use tonic::{body::Body, codegen::Service, service::Routes};

use crate::{
    sql::Engine,
    upstream::{Dial, DialFuture, Io, RequestBody, Serve, ServeFuture},
};

/// An engine's gRPC face.
#[derive(Clone)]
pub struct Embedded {
    engine: Engine,
    routes: Routes,
}

impl Embedded {
    /// That of `engine`.
    pub fn new(engine: Engine) -> Self {
        let routes = engine.routes().prepare();
        Self { engine, routes }
    }
}

impl Dial for Embedded {
    fn dial(&self) -> DialFuture<'_> {
        Box::pin(std::future::ready(Ok(Box::new(self.engine.connect()) as Box<dyn Io>)))
    }

    fn in_process(&self) -> Option<Arc<dyn Serve>> {
        Some(Arc::new(self.clone()))
    }
}

impl Serve for Embedded {
    fn serve(&self, request: Request<RequestBody>) -> ServeFuture {
        let mut routes = self.routes.clone();
        Box::pin(async move {
            let answered: Result<Response<Body>, Infallible> = routes.call(request).await;
            answered.unwrap_or_else(|never| match never {})
        })
    }
}
