//! MemberList: clients with AutoSync adopt the client URLs that it tells, and would walk around the proxy.
//!
//! With an advertised URL, the client URLs of every member are replaced by it, on the wire, so that fields which this
//! program does not know pass untouched. A member without client URLs has not started, and stays without.

use std::sync::atomic::{AtomicBool, Ordering};

use ::http::{Request, Response};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Limited};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field};
use tonic::Code;

use super::{body::Body, forward::forward, listener::Connection, response};
use crate::{
    grpc::{self, Compression, Deframer},
    status::Status,
    upstream::{RequestBody, Upstream},
};

/// A member takes a few hundred bytes.
const ANSWER_LIMIT: usize = 4 << 20;
/// `MemberListResponse.members`.
const MEMBERS: u32 = 2;
/// `Member.clientURLs`.
const CLIENT_URLS: u32 = 4;
const UNREADABLE: Status = Status::fixed(Code::Internal, "unreadable answer to MemberList");

/// Answers MemberList.
pub struct Members {
    advertised: Option<String>,
    warned: AtomicBool,
}

impl Members {
    /// `advertised` is the URL that clients reach the proxy by.
    pub fn new(advertised: Option<String>) -> Self {
        Self { advertised, warned: AtomicBool::new(false) }
    }

    /// For the store within the process: its member list tells this server's own address, so nobody is led around it.
    pub fn embedded() -> Self {
        Self { advertised: None, warned: AtomicBool::new(true) }
    }

    /// Forwards the call and puts the advertised URL in, if there is one.
    pub async fn list(
        &self,
        upstream: &Upstream,
        connection: &Connection,
        request: Request<impl Into<RequestBody>>,
    ) -> Response<Body> {
        let answer = forward(upstream, connection, request, None).await;
        let Some(url) = &self.advertised else {
            if !self.warned.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    "a client asked for the member list: without an advertised client URL, \
                     clients with AutoSync will walk around the proxy"
                );
            }
            return answer;
        };
        match rewritten(answer, url).await {
            Ok(answer) => answer,
            Err(status) => response::error(&status),
        }
    }
}

async fn rewritten(answer: Response<Body>, url: &str) -> Result<Response<Body>, Status> {
    let (mut head, body) = answer.into_parts();
    if grpc::outcome(&head.headers).is_some() {
        return Ok(Response::from_parts(head, body));
    }
    let collected = Limited::new(body, ANSWER_LIMIT).collect().await;
    let collected = collected.map_err(|error| Status::unavailable(format!("error reading from server: {error}")))?;
    if let Some(Err(status)) = collected.trailers().and_then(grpc::outcome) {
        return Err(status);
    }
    let mut deframer = Deframer::compressed(Compression::named(&head.headers, ANSWER_LIMIT)?);
    deframer.push(collected.to_bytes());
    let message = deframer.pop()?.ok_or(UNREADABLE)?;
    let message = replace_in_list(&message, url).ok_or(UNREADABLE)?;
    let mut answer = response::unary(&message);
    // An upstream may compress its answer.
    head.headers.remove(grpc::ENCODING);
    *answer.headers_mut() = head.headers;
    Ok(answer)
}

/// A MemberListResponse with every member rewritten; `None` if it cannot be read.
fn replace_in_list(list: &[u8], url: &str) -> Option<Bytes> {
    rewrite(list, MEMBERS, |out, member| {
        let member = replace_in_member(member, url)?;
        put(out, MEMBERS, &member);
        Some(())
    })
}

fn replace_in_member(member: &[u8], url: &str) -> Option<Bytes> {
    let mut replaced = false;
    rewrite(member, CLIENT_URLS, |out, _| {
        if !std::mem::replace(&mut replaced, true) {
            put(out, CLIENT_URLS, url.as_bytes());
        }
        Some(())
    })
}

/// Copies a message field by field; the length-delimited fields of this `tag` are given to `replace` instead.
fn rewrite(message: &[u8], tag: u32, mut replace: impl FnMut(&mut BytesMut, &[u8]) -> Option<()>) -> Option<Bytes> {
    let mut out = BytesMut::with_capacity(message.len());
    let mut rest = message;
    while rest.has_remaining() {
        let start = rest;
        let (found, wire) = decode_key(&mut rest).ok()?;
        if found == tag && wire == WireType::LengthDelimited {
            let length = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
            let (field, after) = rest.split_at_checked(length)?;
            replace(&mut out, field)?;
            rest = after;
        } else {
            skip_field(wire, found, &mut rest, DecodeContext::default()).ok()?;
            out.put_slice(start.get(..start.len() - rest.len())?);
        }
    }
    Some(out.freeze())
}

fn put(out: &mut BytesMut, tag: u32, field: &[u8]) {
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(field.len() as u64, out);
    out.put_slice(field);
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::proto::etcdserverpb::{Member, MemberListResponse, ResponseHeader};

    fn member(id: u64, urls: &[&str]) -> Member {
        Member {
            id,
            name: format!("etcd-{id}"),
            peer_ur_ls: vec!["http://peer:2380".to_owned()],
            client_ur_ls: urls.iter().map(|url| (*url).to_owned()).collect(),
            is_learner: id == 3,
        }
    }

    fn list(members: Vec<Member>) -> MemberListResponse {
        let header = ResponseHeader { cluster_id: 1, member_id: 2, revision: 0, raft_term: 4 };
        MemberListResponse { header: Some(header), members }
    }

    #[test]
    fn client_urls_become_the_advertised_one_and_nothing_else_changes() {
        let told = list(vec![member(1, &["http://a:1", "http://b:1"]), member(2, &[]), member(3, &["http://c:1"])]);
        let wanted = list(vec![member(1, &["http://pond:1"]), member(2, &[]), member(3, &["http://pond:1"])]);
        let rewritten = replace_in_list(&told.encode_to_vec(), "http://pond:1").unwrap();
        assert_eq!(MemberListResponse::decode(rewritten), Ok(wanted));
    }

    #[test]
    fn unknown_fields_pass() {
        let mut told = list(vec![]).encode_to_vec();
        told.extend_from_slice(&[0xa2, 0x06, 2, 7, 7]);
        assert_eq!(replace_in_list(&told, "http://pond:1").unwrap(), told);
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bytes in [
            &[0x12, 0x7f][..],
            &[0x12, 2, 0x22, 9],
            &[0xff; 12],
            &[0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
        ] {
            assert_eq!(replace_in_list(bytes, "http://pond:1"), None, "{bytes:?}");
        }
    }
}
