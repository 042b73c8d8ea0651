//! Which algorithm multiplies matrices of which sizes: what is asked of the library, and the answers, kept.
//!
//! An answer takes much longer than a launch, so sizes that differ little in rows share one: 64 rows and fewer are told
//! apart, more go up to the next multiple of 16, 64 or 256, within a quarter of what they are. The same question has
//! the same answer, so forgetting one changes no bit of a result.

use std::collections::HashMap;

use crate::cuda::driver::{Element, Gemm, Ptr};

/// Most answers that are kept; a model asks for a few hundred.
const CHOICES_MAX: usize = 4096;

/// Alignments above this say no more.
const ALIGNMENT_MAX: u32 = 256;

/// Everything that a choice depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Question {
    pub(super) element: Element,
    pub(super) out_element: Element,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) out_stride: usize,
    pub(super) bias: bool,
    /// Of the part of the device that it runs on; 0 of all.
    pub(super) multiprocessors: u32,
    pub(super) workspace_bytes: usize,
    /// In bytes: of x, w, and of out and bias, which are walked together.
    pub(super) alignments: [u32; 3],
}

impl Question {
    /// Of just this product.
    pub(super) fn exact(gemm: &Gemm) -> Self {
        Question {
            element: gemm.element,
            out_element: gemm.out_element,
            m: gemm.m,
            n: gemm.n,
            k: gemm.k,
            out_stride: gemm.out_stride,
            bias: gemm.bias != Ptr::NULL,
            multiprocessors: gemm.multiprocessors,
            workspace_bytes: gemm.workspace_bytes,
            alignments: [alignment(gemm.x), alignment(gemm.w), alignment(gemm.out).min(alignment(gemm.bias))],
        }
    }

    /// Of products with about as many rows.
    pub(super) fn about(&self) -> Self {
        Question { m: bucket(self.m), ..*self }
    }
}

/// The largest power of two, up to a limit, that divides an address.
fn alignment(of: Ptr) -> u32 {
    ALIGNMENT_MAX.min(1 << of.0.trailing_zeros().min(31))
}

/// The number of rows that stands for `m`; at least `m`.
fn bucket(m: usize) -> usize {
    match m {
        0..=64 => m,
        65..=256 => m.next_multiple_of(16),
        257..=1024 => m.next_multiple_of(64),
        _ => m.next_multiple_of(256),
    }
}

/// Answers to questions.
pub(super) struct Choices<T> {
    known: HashMap<Question, T>,
}

impl<T: Copy> Choices<T> {
    pub(super) fn new() -> Self {
        Choices { known: HashMap::new() }
    }

    pub(super) fn get(&self, question: &Question) -> Option<T> {
        self.known.get(question).copied()
    }

    /// Keeps an answer. Where there are too many, all others are forgotten: they are asked for again as they are
    /// needed.
    pub(super) fn keep(&mut self, question: Question, answer: T) {
        if self.known.len() >= CHOICES_MAX && !self.known.contains_key(&question) {
            self.known.clear();
        }
        self.known.insert(question, answer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gemm(m: usize) -> Gemm {
        Gemm {
            element: Element::BF16,
            out_element: Element::F32,
            x: Ptr(0x1000),
            w: Ptr(0x2040),
            bias: Ptr::NULL,
            out: Ptr(0x30f0),
            m,
            n: 48,
            k: 32,
            out_stride: 64,
            multiprocessors: 0,
            workspace: Ptr(0x4000),
            workspace_bytes: 1 << 20,
        }
    }

    #[test]
    fn numbers_of_rows_share_buckets() {
        let cases = [
            (0, 0),
            (1, 1),
            (63, 63),
            (64, 64),
            (65, 80),
            (80, 80),
            (81, 96),
            (256, 256),
            (257, 320),
            (1024, 1024),
            (1025, 1280),
            (8192, 8192),
            (8193, 8448),
        ];
        for (m, expected) in cases {
            assert_eq!(bucket(m), expected, "{m} rows");
        }
        for m in 1..10_000 {
            assert!(bucket(m) >= m && bucket(m) * 4 <= m * 5, "{m} rows: {}", bucket(m));
            assert!(bucket(m) >= bucket(m - 1), "{m} rows");
            assert_eq!(bucket(bucket(m)), bucket(m), "{m} rows");
        }
    }

    #[test]
    fn a_question_is_of_everything_that_matters_but_addresses() {
        let exact = Question::exact(&gemm(70));
        assert_eq!(exact.alignments, [256, 64, 16]);
        assert_eq!((exact.m, exact.about().m), (70, 80));
        assert_eq!(exact.about(), Question::exact(&gemm(79)).about());
        assert_ne!(exact.about(), Question::exact(&gemm(81)).about());

        let moved = Gemm { x: Ptr(0x7700), workspace: Ptr(0x9000), ..gemm(70) };
        assert_eq!(Question::exact(&moved), exact);
        let others = [
            Gemm { element: Element::F16, ..gemm(70) },
            Gemm { out_element: Element::BF16, ..gemm(70) },
            Gemm { n: 49, ..gemm(70) },
            Gemm { k: 33, ..gemm(70) },
            Gemm { out_stride: 65, ..gemm(70) },
            Gemm { bias: Ptr(0x5000), ..gemm(70) },
            Gemm { workspace_bytes: 0, ..gemm(70) },
            Gemm { multiprocessors: 48, ..gemm(70) },
            Gemm { x: Ptr(0x1008), ..gemm(70) },
        ];
        for other in others {
            assert_ne!(Question::exact(&other), exact, "{other:?}");
        }
        assert_eq!(alignment(Ptr::NULL), 256);
        assert_eq!(Question::exact(&Gemm { bias: Ptr(0x5004), ..gemm(70) }).alignments, [256, 64, 4]);
    }

    #[test]
    fn answers_are_kept_up_to_a_limit() {
        let question = |m| Question::exact(&gemm(m));
        let mut choices = Choices::new();
        for m in 0..CHOICES_MAX {
            choices.keep(question(m), m);
        }
        choices.keep(question(7), 70);
        assert_eq!((choices.get(&question(7)), choices.get(&question(8))), (Some(70), Some(8)));
        choices.keep(question(CHOICES_MAX), 1);
        assert_eq!((choices.get(&question(7)), choices.get(&question(CHOICES_MAX))), (None, Some(1)));
    }
}
