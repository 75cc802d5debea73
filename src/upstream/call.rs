//! Our own calls: unary ones, and streams whose messages stay undecoded.

use std::{future::Future, marker::PhantomData, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    Method, Request, Uri,
    header::{CONTENT_TYPE, HeaderValue, TE, USER_AGENT},
    uri::Authority,
};
use http_body_util::BodyExt;
use prost::Message;
use tokio::sync::mpsc;
use tonic::Code;

use super::{
    body::RequestBody,
    pages::TooLarge,
    pool::{ConnectionNumber, Slot},
    sender::{Answered, ResponseBody},
};
use crate::{grpc, status::Status};

/// Messages that wait for their stream to take them.
const OUTBOX: usize = 16;
const AGENT: HeaderValue = HeaderValue::from_static(concat!("millpond/", env!("CARGO_PKG_VERSION")));

/// Of which API version we are a client: etcd counts its clients by it, without one as unknown.
const API_VERSION: (&str, &str) = ("client-api-version", "3.7");

const NO_STATUS: Status = Status::fixed(Code::Internal, "server closed the stream without sending trailers");
const NO_MESSAGE: Status = Status::fixed(Code::Internal, "server closed the stream without sending a message");

/// A gRPC request.
pub(super) fn request(
    authority: &Authority,
    path: &'static str,
    metadata: &[(&'static str, &'static str)],
    deadline: Option<Duration>,
    body: RequestBody,
) -> Result<Request<RequestBody>, Status> {
    let invalid = |error: http::Error| Status::new(Code::Internal, format!("cannot call {path}: {error}"));
    let uri =
        Uri::builder().scheme("http").authority(authority.clone()).path_and_query(path).build().map_err(invalid)?;
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(uri)
        .header(CONTENT_TYPE, grpc::MEDIA_TYPE)
        .header(TE, "trailers")
        .header(USER_AGENT, AGENT)
        .header(API_VERSION.0, API_VERSION.1);
    if let Some(deadline) = deadline {
        request = request.header(grpc::TIMEOUT, grpc::timeout_value(deadline));
    }
    for (name, value) in metadata {
        request = request.header(*name, *value);
    }
    request.body(body).map_err(invalid)
}

/// The single message of a unary answer.
pub(super) async fn unary_message(response: Answered) -> Result<Bytes, Status> {
    Reading::new(response)?.single().await
}

/// The same, unless it announces more than `most` bytes.
pub(super) async fn message_up_to(response: Answered, most: usize) -> Result<Result<Bytes, TooLarge>, Status> {
    let mut stream = Reading::new(response)?;
    match stream.announced().await? {
        Some(announced) if announced > most => Ok(Err(TooLarge { announced })),
        _ => stream.single().await.map(Ok),
    }
}

/// The messages of a response.
struct Reading {
    body: ResponseBody,
    deframer: grpc::Deframer,
    ended: bool,
}

impl Reading {
    fn new(response: Answered) -> Result<Self, Status> {
        let (head, body) = response.into_parts();
        if let Some(Err(status)) = grpc::outcome(&head.headers) {
            return Err(status);
        }
        if !head.status.is_success() {
            return Err(grpc::from_http(head.status));
        }
        let ended = matches!(grpc::outcome(&head.headers), Some(Ok(())));
        Ok(Self { body, deframer: grpc::Deframer::default(), ended })
    }

    async fn next(&mut self) -> Option<Result<Bytes, Status>> {
        loop {
            match self.deframer.pop() {
                Ok(Some(message)) => return Some(Ok(message)),
                Ok(None) if self.ended => return None,
                Ok(None) => {}
                Err(status) => return self.fail(status),
            }
            if let Err(status) = self.read().await {
                return self.fail(status);
            }
        }
    }

    /// The only message there is to be.
    async fn single(&mut self) -> Result<Bytes, Status> {
        let message = self.next().await.unwrap_or(Err(NO_MESSAGE))?;
        match self.next().await {
            Some(Err(status)) => Err(status),
            _ => Ok(message),
        }
    }

    /// The length of the next message, as soon as it is known; `None` when there is no other.
    async fn announced(&mut self) -> Result<Option<usize>, Status> {
        while self.deframer.announced().is_none() && !self.ended {
            self.read().await?;
        }
        Ok(self.deframer.announced())
    }

    /// Takes in what comes next: a piece of a message, or the end.
    async fn read(&mut self) -> Result<(), Status> {
        let Some(frame) = self.body.frame().await else { return Err(NO_STATUS) };
        match frame.map_err(|error| grpc::from_transport(&error))?.into_data() {
            Ok(data) => self.deframer.push(data),
            Err(frame) => {
                let trailers = frame.into_trailers().ok();
                trailers.and_then(|trailers| grpc::outcome(&trailers)).unwrap_or(Err(NO_STATUS))?;
                self.ended = true;
            }
        }
        Ok(())
    }

    fn incomplete(&self) -> usize {
        self.deframer.len()
    }

    fn fail(&mut self, status: Status) -> Option<Result<Bytes, Status>> {
        self.ended = true;
        Some(Err(status))
    }
}

/// Sends the messages of a call; dropping it, or [`StreamSender::finish`], closes this direction.
pub struct StreamSender<Q> {
    outbox: mpsc::Sender<Bytes>,
    _request: PhantomData<fn(&Q)>,
}

impl<Q: Message> StreamSender<Q> {
    /// The sender, and the request body that carries what it sends.
    pub(super) fn new() -> (Self, RequestBody) {
        let (outbox, messages) = mpsc::channel(OUTBOX);
        (Self { outbox, _request: PhantomData }, RequestBody::Messages(messages))
    }

    /// Hands one message to the stream, waiting while earlier ones are stuck.
    ///
    /// # Errors
    /// Unavailable when the stream has ended; its receiving side tells why.
    pub async fn send(&self, message: &Q) -> Result<(), Status> {
        let sent = self.outbox.send(grpc::frame(message)).await;
        sent.map_err(|_| Status::fixed(Code::Unavailable, "error writing to server: the stream has ended"))
    }

    /// Says that no more messages come.
    pub fn finish(self) {}
}

type Opening = Pin<Box<dyn Future<Output = Result<(Answered, Arc<Slot>), Status>> + Send>>;

/// Receives the messages of a call. The call is cancelled when both its sides are dropped before its end.
pub struct StreamReceiver {
    connection: ConnectionNumber,
    state: State,
}

enum State {
    /// A server may send its headers with its first message only.
    Opening(Opening),
    Open(Reading, #[allow(dead_code, reason = "keeps the place on the connection")] Arc<Slot>),
    Ended,
}

impl StreamReceiver {
    pub(super) fn new(
        connection: ConnectionNumber,
        opening: impl Future<Output = Result<(Answered, Arc<Slot>), Status>> + Send + 'static,
    ) -> Self {
        Self { connection, state: State::Opening(Box::pin(opening)) }
    }

    /// Which connection the call is on.
    pub fn connection(&self) -> ConnectionNumber {
        self.connection
    }

    /// Bytes of the next message that have come, as long as it is not whole.
    pub fn incomplete(&self) -> usize {
        match &self.state {
            State::Open(reading, _) => reading.incomplete(),
            State::Opening(_) | State::Ended => 0,
        }
    }

    /// The next message, undecoded. `None` after a success; an error is the last item.
    pub async fn next(&mut self) -> Option<Result<Bytes, Status>> {
        loop {
            let step = match &mut self.state {
                State::Opening(opening) => match opening.await {
                    Ok((response, slot)) => Reading::new(response).map(|reading| State::Open(reading, slot)),
                    Err(status) => Err(status),
                },
                State::Open(reading, _) => match reading.next().await {
                    Some(Ok(message)) => return Some(Ok(message)),
                    Some(Err(status)) => Err(status),
                    None => Ok(State::Ended),
                },
                State::Ended => return None,
            };
            match step {
                Ok(state) => self.state = state,
                Err(status) => {
                    self.state = State::Ended;
                    return Some(Err(status));
                }
            }
        }
    }
}
