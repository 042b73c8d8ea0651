//! What a request asks for beside its answer: urgency, time, and with whom it shares its prefix.

use crate::error::ServeError;
use crate::http::types::common::{GenerationFields, ServiceTier};
use crate::keys::Asked;
use axum::http::HeaderMap;
use std::time::Duration;

/// As `timeout`, in milliseconds, for clients and proxies that do not touch bodies.
const TIMEOUT_HEADER: &str = "x-request-timeout-ms";
const TIMEOUT_S_MAX: f64 = 86_400.0;
const CACHE_SALT_CHARS_MAX: usize = 1024;

/// The fields of a request's body.
pub(super) fn asked(fields: &mut GenerationFields) -> Result<Asked, ServeError> {
    let tier = match fields.service_tier {
        Some(ServiceTier::Priority) => -1,
        Some(ServiceTier::Flex) => 1,
        Some(ServiceTier::Auto | ServiceTier::Default) | None => 0,
    };
    let cache_salt = fields.cache_salt.take();
    if let Some(found) = cache_salt.as_ref().map(|salt| salt.chars().count()) {
        if !(1..=CACHE_SALT_CHARS_MAX).contains(&found) {
            let message = format!("`cache_salt`: expected 1 to {CACHE_SALT_CHARS_MAX} characters, found {found}");
            return Err(ServeError::invalid("cache_salt", message));
        }
    }
    let timeout = fields.timeout.map(|seconds| {
        // Below a millisecond nothing can be done.
        if (1e-3..=TIMEOUT_S_MAX).contains(&seconds) {
            return Ok(Duration::from_secs_f64(seconds));
        }
        let message = format!("`timeout`: expected seconds in [0.001, {TIMEOUT_S_MAX}], found {seconds}");
        Err(ServeError::invalid("timeout", message))
    });
    let class_steps = fields.priority.unwrap_or(0).saturating_add(tier);
    Ok(Asked { class_steps, cache_salt, timeout: timeout.transpose()? })
}

/// The time limit that a request's header sets.
pub(crate) fn header_timeout(headers: &HeaderMap) -> Result<Option<Duration>, ServeError> {
    let Some(value) = headers.get(TIMEOUT_HEADER) else { return Ok(None) };
    let ms_max = (TIMEOUT_S_MAX * 1e3) as u64;
    let ms = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
    match ms.filter(|ms| (1..=ms_max).contains(ms)) {
        Some(ms) => Ok(Some(Duration::from_millis(ms))),
        None => {
            let found: String = value.to_str().unwrap_or("?").chars().take(32).collect();
            let message = format!("`{TIMEOUT_HEADER}`: expected milliseconds in [1, {ms_max}], found `{found}`");
            Err(ServeError::invalid(TIMEOUT_HEADER, message))
        }
    }
}
