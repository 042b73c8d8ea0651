//! The HTTP front end over real sockets, with an engine that says what a test tells it to.
#![allow(clippy::unwrap_used)]

mod answers;
mod bad_input;
mod fixture;
mod keys;
mod lifecycle;
mod limits;
mod openapi;
mod property;
mod streams;
mod tiny_model;
