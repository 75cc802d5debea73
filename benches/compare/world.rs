//! The servers of a run, the keys in the etcd, and measuring one load on one server.

use std::time::Duration;

use bytes::Bytes;
use millpond::{
    cli::bench::{
        drive::{Conduct, Load, drive},
        fill::Filler,
        loads::{CallLoad, Delivery, WatchLoad},
        report::{Deliveries, Report},
        requests::{Keys, Ready, Source},
        watchers::Fleet,
        wire::Manners,
    },
    grpc,
    proto::{
        etcdserverpb::{RangeRequest, kv_client::KvClient},
        paths,
    },
};
use tokio::runtime::Runtime;

use super::{
    Outcome,
    servers::{Server, System},
};

/// Time under load before counting.
const WARMUP: Duration = Duration::from_millis(700);

/// Time that counts, unless a row says otherwise.
pub const WINDOW: Duration = Duration::from_secs(3);

/// Where and how much.
#[derive(Clone, Copy)]
pub struct Loading {
    /// Connections.
    pub connections: usize,
    /// Calls in flight on each.
    pub in_flight: usize,
}

/// The servers, started when they are first needed, and what has been written.
pub struct World {
    runtime: Runtime,
    etcd: Server,
    proxy: Option<Server>,
    /// None inside: it could not be started, which is told once.
    millpond: Option<Option<Server>>,
    filled: Vec<(String, u64)>,
}

impl World {
    /// Starts an etcd. `with_millpond` is false for a look at the others alone.
    pub fn new(with_millpond: bool) -> Outcome<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let millpond = if with_millpond { None } else { Some(None) };
        Ok(Self { runtime, etcd: Server::etcd()?, proxy: None, millpond, filled: Vec::new() })
    }

    /// The etcd behind the proxies.
    pub fn etcd(&self) -> &Server {
        &self.etcd
    }

    /// Those keys, written to the etcd unless they are there.
    pub fn keys(&mut self, prefix: &str, count: u64, value_size: usize) -> Outcome<Keys> {
        let keys = Keys { prefix: prefix.to_owned(), count };
        if !self.filled.contains(&(prefix.to_owned(), count)) {
            fill(&self.runtime, &self.etcd.endpoint, &keys, value_size)?;
            self.filled.push((prefix.to_owned(), count));
        }
        Ok(keys)
    }

    /// A server that does everything, started again if it has ended. None: it could not be started.
    pub fn server(&mut self, system: System) -> Outcome<Option<&Server>> {
        match system {
            System::Etcd => Ok(Some(&self.etcd)),
            System::GrpcProxy => {
                if self.proxy.as_mut().is_none_or(Server::is_gone) {
                    self.proxy = Some(Server::grpc_proxy(&self.etcd.endpoint)?);
                }
                Ok(self.proxy.as_ref())
            }
            System::Millpond => {
                if self.millpond.as_mut().is_none_or(|tried| tried.as_mut().is_some_and(Server::is_gone)) {
                    self.millpond = Some(warm_millpond(&self.etcd.endpoint));
                }
                Ok(self.millpond.as_ref().and_then(Option::as_ref))
            }
            System::Bare => Err("a bare server has one fixed answer; start one for it".into()),
        }
    }

    /// A bare server that answers every call as the etcd answers that request.
    pub fn bare(&self, request: &RangeRequest) -> Outcome<Server> {
        let answer = self.runtime.block_on(async {
            let client = KvClient::connect(format!("http://{}", self.etcd.endpoint)).await?;
            let answer = client.max_decoding_message_size(usize::MAX).range(request.clone()).await?;
            Outcome::Ok(grpc::frame(answer.get_ref()))
        })?;
        Server::bare(&answer)
    }

    /// A server of its own for a row that looks at memory, in front of an empty etcd that is returned beside it.
    pub fn fresh(system: System) -> Outcome<(Server, Option<Server>)> {
        let etcd = Server::etcd()?;
        match system {
            System::Etcd | System::Bare => Ok((etcd, None)),
            System::GrpcProxy => Ok((Server::grpc_proxy(&etcd.endpoint)?, Some(etcd))),
            System::Millpond => Ok((Self::millpond(&etcd.endpoint)?, Some(etcd))),
        }
    }

    /// A warm Millpond of its own in front of an endpoint.
    pub fn millpond(upstream: &str) -> Outcome<Server> {
        Ok(warm_millpond(upstream).ok_or("Millpond did not become warm")?)
    }

    /// Whether Millpond can be measured at all.
    pub fn has_millpond(&mut self) -> Outcome<bool> {
        Ok(self.server(System::Millpond)?.is_some())
    }
}

/// Writes keys to an endpoint.
pub fn fill(runtime: &Runtime, endpoint: &str, keys: &Keys, value_size: usize) -> Outcome<()> {
    runtime.block_on(async { Filler::connect(endpoint).await?.fill(keys, value_size, |_| {}).await })?;
    Ok(())
}

fn warm_millpond(upstream: &str) -> Option<Server> {
    let warm = Server::millpond(upstream).and_then(|mut server| {
        server.wait(Server::is_warm)?;
        Ok(server)
    });
    warm.inspect_err(|error| eprintln!("without Millpond: {error}")).ok()
}

/// Runs ranges in a closed loop.
pub fn ranges(server: &Server, requests: &[RangeRequest], loading: Loading) -> Outcome<Report> {
    calls(server, paths::RANGE, &|_| Box::new(Ready::new(requests)), loading)
}

/// Runs unary calls in a closed loop.
pub fn calls(
    server: &Server,
    path: &str,
    source: &(dyn Fn(usize) -> Box<dyn Source> + Sync),
    loading: Loading,
) -> Outcome<Report> {
    let endpoints = [server.endpoint.clone()];
    let Loading { connections, in_flight } = loading;
    let load = CallLoad { endpoints: &endpoints, path, connections, in_flight, manners: Manners::Go, source };
    let report = measure(&load, server, "call", WINDOW)?;
    if report.errors > 0 || report.operations == 0 {
        return Err(
            format!("{}: {} calls failed, {} did not", server.system.name(), report.errors, report.operations).into()
        );
    }
    Ok(report)
}

/// Runs watchers with a writer on the given endpoint.
pub fn watchers(server: &Server, write_endpoint: &str, fleet: Fleet, rate: f64, window: Duration) -> Outcome<Report> {
    let endpoints = [server.endpoint.clone()];
    let load = WatchLoad {
        endpoints: &endpoints,
        write_endpoint,
        fleet,
        rate,
        value_size: 512,
        manners: Manners::Go,
        delivery: Delivery::default(),
    };
    let mut report = measure(&load, server, "event", window)?;
    let expected = load.delivery.expected(load.fleet.watchers_per_write());
    report.deliveries = Some(Deliveries { expected, seen: load.delivery.seen() });
    Ok(report)
}

/// Drives a load with the server's CPU time taken.
pub fn measure(load: &impl Load, server: &Server, unit: &'static str, window: Duration) -> Outcome<Report> {
    let conduct = Conduct { threads: 1, warmup: WARMUP, duration: window, pid: Some(server.pid()) };
    let outcome = drive(load, conduct, |_, _| {})?;
    Ok(Report::new(server.system.name().to_owned(), unit, &outcome, None))
}

/// A fleet on keys of its own.
pub fn fleet(connections: usize, streams: usize, watchers: usize) -> Fleet {
    let prefix = format!("/watch/{connections}/{streams}/{watchers}/");
    Fleet { connections, streams, watchers, prefix, distinct: false }
}

/// An answer of nothing, for a bare server that only watches.
pub fn nothing() -> Bytes {
    grpc::frame(&millpond::proto::etcdserverpb::RangeResponse::default())
}
