//! Kvern, a self-hosted LLM inference server.

pub mod config;
pub mod hub;
pub mod request;
pub mod telemetry;
pub mod text;
