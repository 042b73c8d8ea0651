//! The server under test: a process of its own, started with its flags and keys, watched from outside, stopped by SIGTERM.

use crate::client::Client;
use crate::keys::{self, Tenant};
use crate::{Outcome, Setup};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const READY_MAX: Duration = Duration::from_secs(120);
/// More than the server's own limit for its drain.
const STOP_MAX: Duration = Duration::from_secs(45);
const POLL: Duration = Duration::from_millis(20);

/// What a scenario needs that a server may lack.
pub(crate) fn require(setup: &Setup, flags: &[&str]) -> Outcome<()> {
    let help = Command::new(&setup.kvern).args(["serve", "--help"]).output();
    let help = help.map_err(|error| format!("{}: {error}", setup.kvern.display()))?;
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    let known = |flag: &str| help.split_whitespace().any(|word| word == flag);
    match flags.iter().find(|flag| !known(flag)) {
        Some(flag) => Err(format!("this scenario needs `kvern serve {flag}`, which this kvern lacks").into()),
        None => Ok(()),
    }
}

pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    epoch: Instant,
    /// Holds the keys file and the log; removed at the end.
    folder: TempDir,
    /// For what is no request of a scenario.
    key: Option<&'static str>,
}

/// Who may ask a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Open,
    Tenants,
}

impl Server {
    /// A server that is ready to answer, for anybody or for the tenants.
    pub(crate) async fn start(setup: &Setup, flags: &[String], access: Access) -> Outcome<Server> {
        let folder = tempfile::tempdir()?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let log = std::fs::File::create(log(&folder))?;
        let mut command = Command::new(&setup.kvern);
        command.arg("serve").arg(&setup.model).args(["--host", "127.0.0.1", "--served-model-name", "bench"]);
        command.args(["--log-level", "error", "--threads", &setup.threads.to_string(), "--port", &port.to_string()]);
        if access == Access::Tenants {
            let path = folder.path().join("keys.toml");
            std::fs::write(&path, keys::file())?;
            command.arg("--keys").arg(path);
        }
        command.args(flags).args(&setup.flag);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        let child = child.map_err(|error| format!("{}: {error}", setup.kvern.display()))?;
        let address = (Ipv4Addr::LOCALHOST, port).into();
        let key = (access == Access::Tenants).then(|| Tenant::A.secret());
        let mut server = Server { child, address, epoch: setup.epoch, folder, key };
        server.wait_ready().await?;
        Ok(server)
    }

    async fn wait_ready(&mut self) -> Outcome<()> {
        let began = Instant::now();
        loop {
            let ready = self.client().get("/health/ready", None).await;
            if ready.is_ok_and(|(status, ..)| status == 200) {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the server ended before it was ready ({status}): {}", self.log()).into());
            }
            if began.elapsed() > READY_MAX {
                return Err(format!("the server was not ready after {READY_MAX:?}: {}", self.log()).into());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Callers of their own connections.
    pub(crate) fn client(&self) -> Rc<Client> {
        Rc::new(Client::new(self.address, self.epoch))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(log(&self.folder)).unwrap_or_default()
    }

    /// Bytes of memory that the process holds, without those of the model's file that it only has mapped.
    pub(crate) fn memory_bytes(&self) -> f64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap_or_default();
        let pages: Vec<f64> = statm.split_whitespace().filter_map(|pages| pages.parse().ok()).collect();
        let &[_, resident, shared, ..] = &pages[..] else { return 0.0 };
        // SAFETY: the call takes no pointer.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        (resident - shared) * page as f64
    }

    /// Whether the engine says that it makes progress.
    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The sum of all series of a metric, named without labels; 0 where there is none.
    pub(crate) async fn metric(&self, name: &str) -> Outcome<f64> {
        let (_, text, _) = self.client().get("/metrics", self.key).await?;
        let of = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        let values = text.lines().filter(of).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(values.sum())
    }

    /// Whether the API's description knows the field of a request.
    pub(crate) async fn requires_field(&self, field: &str) -> Outcome<()> {
        let (_, text, _) = self.client().get("/openapi.json", self.key).await?;
        let described: serde_json::Value = serde_json::from_str(&text)?;
        let fields = &described["components"]["schemas"]["CompletionRequest"]["properties"];
        if fields.get(field).is_some() {
            return Ok(());
        }
        Err(format!("this scenario needs the field `{field}` of requests, which this kvern lacks").into())
    }

    /// Ends it as an operator does; its exit status.
    pub(crate) async fn stop(mut self) -> Outcome<ExitStatus> {
        // SAFETY: the call takes no pointer; the process was not waited for, so that its number is still its own.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        let began = Instant::now();
        while began.elapsed() < STOP_MAX {
            if let Some(status) = self.child.try_wait()? {
                return if status.success() {
                    Ok(status)
                } else {
                    Err(format!("the server ended with {status}: {}", self.log()).into())
                };
            }
            tokio::time::sleep(POLL).await;
        }
        Err(format!("the server did not stop within {STOP_MAX:?} of SIGTERM: {}", self.log()).into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn log(folder: &TempDir) -> PathBuf {
    Path::join(folder.path(), "log")
}
