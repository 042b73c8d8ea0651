//! The log: structured lines on standard error, so that standard output stays the answer's.

use crate::config::{LogConfig, LogFormat};
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// Installs the log for the process; call once.
///
/// # Errors
/// When a log is installed already.
pub fn init_log(config: &LogConfig) -> Result<(), TryInitError> {
    // The level was parsed with the settings, so that nothing is lost here.
    let filter = EnvFilter::builder().parse_lossy(&config.level);
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).finish().try_init(),
        LogFormat::Json => log.json().flatten_event(true).with_current_span(false).finish().try_init(),
    }
}
