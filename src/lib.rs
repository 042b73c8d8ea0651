//! Kvern, a self-hosted LLM inference server.

pub mod request;
pub mod text;
