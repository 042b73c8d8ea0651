//! Stop strings in streamed text.
//!
//! Owner: the task that streams one answer. Text arrives in pieces of any size; a piece leaves as soon as it can no longer
//! be part of a stop string, so that a client never sees a piece of one.
//!
//! An Aho-Corasick automaton over bytes: time linear in the text whatever the number of stop strings, memory linear in
//! their total length. Its state's depth is the length of the longest end of the text that begins a stop string, which is
//! exactly what must be held back.
//!
//! Invariant: what was emitted, followed by what is held, is the text so far; and the result does not depend on how the
//! text was cut into pieces.

use std::collections::VecDeque;
use std::sync::Arc;

const ROOT: u32 = 0;

/// One node of the automaton: a prefix of at least one stop string.
#[derive(Clone, Debug, Default)]
struct Node {
    /// Sorted by byte.
    children: Vec<(u8, u32)>,
    /// The node of the longest proper suffix that is also in the automaton.
    fail: u32,
    /// Bytes from the root.
    depth: u32,
    /// The longest stop string that ends here.
    stop: Option<u32>,
}

/// A stop string that cannot be searched for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a non-empty stop string, found an empty one at index {index}")]
pub struct EmptyStopString {
    pub index: usize,
}

/// What a piece of text made certain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopStep<'a> {
    /// Text for the client.
    pub text: &'a str,
    /// The stop string that was found, an index into the list given; the answer ends with `text`.
    pub matched: Option<usize>,
}

/// Finds the first stop string in text that arrives in pieces.
///
/// The first one to be complete wins; of several that end on the same byte, the longest. Clones share the automaton.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    nodes: Arc<[Node]>,
    lengths: Arc<[usize]>,
    include: bool,
    state: u32,
    /// Text not yet emitted starts at `start`; what precedes it was emitted and goes with the next call.
    buffer: String,
    start: usize,
    matched: Option<usize>,
}

impl StopMatcher {
    /// A matcher for `stops`, none of which may be empty; `include_stop_str_in_output` emits the stop string too.
    pub fn new<S: AsRef<str>>(stops: &[S], include_stop_str_in_output: bool) -> Result<Self, EmptyStopString> {
        if let Some(index) = stops.iter().position(|stop| stop.as_ref().is_empty()) {
            return Err(EmptyStopString { index });
        }
        Ok(Self {
            nodes: automaton(stops).into(),
            lengths: stops.iter().map(|stop| stop.as_ref().len()).collect(),
            include: include_stop_str_in_output,
            state: ROOT,
            buffer: String::new(),
            start: 0,
            matched: None,
        })
    }

    /// Takes the next piece; text after a match is dropped.
    pub fn push(&mut self, piece: &str) -> StopStep<'_> {
        if self.matched.is_some() {
            return self.step(0);
        }
        self.compact();
        for (index, &byte) in piece.as_bytes().iter().enumerate() {
            self.state = self.next(self.state, byte);
            if let Some(stop) = self.nodes[self.state as usize].stop {
                return self.found(stop as usize, &piece[..=index]);
            }
        }
        self.buffer.push_str(piece);
        let held = self.nodes[self.state as usize].depth as usize;
        self.step(self.buffer.len() - held - self.start)
    }

    /// The text ended: what was held back was no stop string.
    pub fn finish(&mut self) -> &str {
        if self.matched.is_some() {
            return "";
        }
        self.compact();
        self.state = ROOT;
        self.step(self.buffer.len() - self.start).text
    }

    /// The stop string that was found, if any.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    fn found(&mut self, stop: usize, piece: &str) -> StopStep<'_> {
        self.buffer.push_str(piece);
        self.matched = Some(stop);
        let cut = if self.include { 0 } else { self.lengths[stop] };
        // Nothing of the stop string was emitted: the state's depth never fell below the matched part of it.
        self.step(self.buffer.len() - cut - self.start)
    }

    /// Emits the next `length` bytes of the buffer.
    fn step(&mut self, length: usize) -> StopStep<'_> {
        let from = self.start;
        self.start += length;
        StopStep { text: &self.buffer[from..self.start], matched: self.matched }
    }

    /// Drops emitted text once it is the larger part, which keeps the moving of held text linear.
    fn compact(&mut self) {
        if self.start * 2 >= self.buffer.len() {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
    }

    fn next(&self, mut state: u32, byte: u8) -> u32 {
        loop {
            if let Some(child) = child(&self.nodes[state as usize], byte) {
                return child;
            }
            if state == ROOT {
                return ROOT;
            }
            state = self.nodes[state as usize].fail;
        }
    }
}

fn child(node: &Node, byte: u8) -> Option<u32> {
    let index = node.children.binary_search_by_key(&byte, |&(key, _)| key).ok()?;
    Some(node.children[index].1)
}

/// The trie of all stop strings, then failure links breadth first (Aho and Corasick, 1975).
fn automaton<S: AsRef<str>>(stops: &[S]) -> Vec<Node> {
    let mut nodes = vec![Node::default()];
    for (index, stop) in stops.iter().enumerate() {
        let mut at = ROOT;
        for &byte in stop.as_ref().as_bytes() {
            at = match nodes[at as usize].children.binary_search_by_key(&byte, |&(key, _)| key) {
                Ok(found) => nodes[at as usize].children[found].1,
                Err(place) => {
                    let new = nodes.len() as u32;
                    nodes.push(Node { depth: nodes[at as usize].depth + 1, ..Node::default() });
                    nodes[at as usize].children.insert(place, (byte, new));
                    new
                }
            };
        }
        nodes[at as usize].stop.get_or_insert(index as u32);
    }
    let mut queue = VecDeque::from([ROOT]);
    while let Some(parent) = queue.pop_front() {
        for (byte, node) in nodes[parent as usize].children.clone() {
            let mut fail = ROOT;
            let mut at = parent;
            while at != ROOT {
                at = nodes[at as usize].fail;
                if let Some(found) = child(&nodes[at as usize], byte) {
                    fail = found;
                    break;
                }
            }
            nodes[node as usize].fail = fail;
            if nodes[node as usize].stop.is_none() {
                nodes[node as usize].stop = nodes[fail as usize].stop;
            }
            queue.push_back(node);
        }
    }
    nodes
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// Text emitted, and the stop string found, when the text arrives in these pieces.
    fn stream(stops: &[String], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops, include).unwrap();
        let mut out = String::new();
        for piece in pieces {
            let step = matcher.push(piece);
            out.push_str(step.text);
            if step.matched.is_some() {
                assert_eq!(matcher.push("more").text, "");
                assert_eq!(matcher.finish(), "");
                return (out, matcher.matched());
            }
        }
        out.push_str(matcher.finish());
        (out, None)
    }

    /// The first end at which a stop string is complete, searched for at every end anew.
    fn oracle(stops: &[String], include: bool, text: &str) -> (String, Option<usize>) {
        for end in 0..=text.len() {
            let Some(head) = text.get(..end) else { continue };
            let longest = stops.iter().filter(|stop| head.ends_with(stop.as_str())).map(String::len).max();
            if let Some(length) = longest {
                let index = stops.iter().position(|stop| stop.len() == length && head.ends_with(stop.as_str()));
                return (head[..if include { end } else { end - length }].to_string(), index);
            }
        }
        (text.to_string(), None)
    }

    #[test]
    fn table() {
        /// Stop strings, pieces, text emitted, match.
        type Case = (&'static [&'static str], &'static [&'static str], &'static str, Option<usize>);
        let cases: &[Case] = &[
            (&["stop"], &["a st", "op b"], "a ", Some(0)),
            (&["stop"], &["a st", "o"], "a sto", None),
            (&["ab", "b"], &["xab"], "x", Some(0)),
            (&["abcd", "bc"], &["a", "b", "c", "d"], "a", Some(1)),
            (&["\n\n"], &["a\n", "b\n", "\n"], "a\nb", Some(0)),
            (&["é"], &["cafe", "é!"], "cafe", Some(0)),
            (&["x", "x"], &["x"], "", Some(0)),
            (&[], &["anything"], "anything", None),
        ];
        for (stops, pieces, text, matched) in cases {
            let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
            assert_eq!(stream(&stops, false, pieces), (text.to_string(), *matched), "{stops:?} {pieces:?}");
        }
    }

    #[test]
    fn empty_stop_string_is_refused() {
        assert_eq!(StopMatcher::new(&["a", ""], false).unwrap_err(), EmptyStopString { index: 1 });
    }

    #[test]
    fn text_leaves_as_soon_as_it_is_certain() {
        let mut matcher = StopMatcher::new(&["###"], false).unwrap();
        assert_eq!(matcher.push("a#").text, "a");
        assert_eq!(matcher.push("b").text, "#b");
        assert_eq!(matcher.push("##").text, "");
        assert_eq!(matcher.push("c").text, "##c");
    }

    #[test]
    fn long_held_text_is_linear() {
        // Each byte is held behind 4,095 others; a matcher that moved or rescanned them would need 10^9 steps.
        let stop = "a".repeat(4096) + "b";
        let mut matcher = StopMatcher::new(&[stop], false).unwrap();
        let mut moved = 0;
        let mut emitted = 0;
        for _ in 0..300_000 {
            let before = matcher.buffer.len();
            emitted += matcher.push("a").text.len();
            if matcher.buffer.len() < before {
                moved += matcher.buffer.len();
            }
        }
        assert_eq!(emitted + matcher.finish().len(), 300_000);
        assert!(moved < 1_000_000, "moved {moved} bytes for 300,000");
    }

    proptest! {
        #[test]
        fn equals_the_oracle_however_text_is_cut(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            text in "[abcé]{0,24}",
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
            include in any::<bool>(),
        ) {
            let bounds: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
            let mut at: Vec<usize> = cuts.iter().map(|cut| bounds[cut.index(bounds.len())]).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let pieces: Vec<&str> = at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            prop_assert_eq!(stream(&stops, include, &pieces), oracle(&stops, include, &text));
        }

        #[test]
        fn every_cut_of_two(stops in prop::collection::vec("[ab]{1,3}", 1..4), text in "[ab]{0,12}") {
            for at in 0..=text.len() {
                let pieces = [&text[..at], &text[at..]];
                prop_assert_eq!(stream(&stops, false, &pieces), oracle(&stops, false, &text));
            }
        }
    }
}
