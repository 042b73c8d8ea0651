//! Products of matrices, by cuBLASLt.
//!
//! The library sees matrices by columns, so a row-major one is its own transpose there, and what is computed is
//! `out^T [n x m] = w [n x k] x^T [k x m]`: w is A, transposed, x is B, and rows lie one leading dimension apart.
//! Sums are taken in f32, also where the work of one sum is divided; f32 is never rounded to tf32. What the library has
//! no algorithm for is an error.

use std::ffi::c_void;
use std::fmt::{self, Display};
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::sys::{
    self, cublasLtEpilogue_t as Epilogue, cublasLtMatmulDescAttributes_t as Detail,
    cublasLtMatmulPreferenceAttributes_t as Wish, cublasLtReductionScheme_t as Reduction, cublasStatus_t as Status,
    cudaDataType_t as DataType,
};
use cudarc::driver::sys::CUstream;

use super::choices::{Choices, Question};
use super::context::Context;
use super::graphs::Unrestricted;
use super::table::Raw;
use crate::cuda::driver::{Element, Gemm, Ptr};
use crate::{KernelError, Result};

/// Version of the library from which on all that is used here is there.
const VERSION_MIN: usize = 120_000;

/// `CUBLAS_OP_T`, which the bindings of this library lack: they have it with those of cuBLAS.
const TRANSPOSED: i32 = 1;

/// Answers that are asked for at once; the first that is one is taken.
const ANSWERS: usize = 4;

/// The library, and what it has chosen so far.
pub(super) struct Products {
    handle: Raw<sys::cublasLtContext>,
    choices: Mutex<Choices<sys::cublasLtMatmulAlgo_t>>,
}

impl Products {
    /// Loads the library; the context is current.
    pub(super) fn open() -> Result<Self> {
        // SAFETY: loading a library runs its initializers; this one belongs to the system's CUDA.
        if !unsafe { sys::is_culib_present() } {
            let text =
                "expected the library cublasLt of CUDA 13 (libcublasLt.so.13) where libraries are searched, found none";
            return Err(KernelError::Unsupported(text.into()));
        }
        // SAFETY: no preconditions.
        let version = unsafe { sys::cublasLtGetVersion() };
        if version < VERSION_MIN {
            let text = format!("expected cublasLt of version {VERSION_MIN} or later, found {version}");
            return Err(KernelError::Unsupported(text));
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer is to a local of the type that is written.
        check("cublasLtCreate", unsafe { sys::cublasLtCreate(&raw mut handle) })?;
        Ok(Products { handle: Raw(handle), choices: Mutex::new(Choices::new()) })
    }

    /// Puts a product on a stream.
    ///
    /// # Safety
    /// As [`Driver::gemm`](crate::cuda::driver::Driver::gemm); the context is current.
    pub(super) unsafe fn run(&self, context: &Context, stream: CUstream, gemm: &Gemm) -> Result<()> {
        if gemm.m == 0 {
            return Ok(());
        }
        let exact = Question::exact(gemm);
        let about = exact.about();
        let known = {
            let choices = self.choices.lock().unwrap_or_else(PoisonError::into_inner);
            choices.get(&exact).or_else(|| choices.get(&about))
        };
        // The library may load code at its first product of a kind, which a thread that records may not do otherwise.
        let _loading = if known.is_none() { Some(Unrestricted::begin(context)?) } else { None };
        let choice = match known {
            Some(choice) => choice,
            None => self.ask(context, &about, gemm.bias)?,
        };
        let problem = Problem::new(&exact, gemm.bias)?;
        // SAFETY: the caller's.
        let status = unsafe { self.multiply(stream, gemm, &problem, &choice) };
        // What suits about as many rows does not always suit just these.
        let refused = matches!(status, Status::CUBLAS_STATUS_NOT_SUPPORTED | Status::CUBLAS_STATUS_INVALID_VALUE);
        let status = if refused && exact != about {
            let _loading = Unrestricted::begin(context)?;
            let choice = self.ask(context, &exact, gemm.bias)?;
            // SAFETY: the caller's; what was refused has not begun.
            unsafe { self.multiply(stream, gemm, &problem, &choice) }
        } else {
            status
        };
        check(Named("cublasLtMatmul", &exact), status).map_err(|error| worst(context, error))
    }

    /// Asks the library for an algorithm, and keeps the answer.
    fn ask(&self, context: &Context, question: &Question, bias: Ptr) -> Result<sys::cublasLtMatmulAlgo_t> {
        let problem = Problem::new(question, bias)?;
        let wishes = Wishes::new(question)?;
        let mut answers = [const { std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit() }; ANSWERS];
        let mut count = 0;
        // SAFETY: all descriptions live until the call returns; the answers are as many as said.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle.0,
                problem.product.0,
                problem.w.0,
                problem.x.0,
                problem.out.0,
                problem.out.0,
                wishes.0,
                i32::try_from(ANSWERS).expect("a few"),
                answers.as_mut_ptr().cast(),
                &raw mut count,
            )
        };
        check(Named("cublasLtMatmulAlgoGetHeuristic", question), status).map_err(|error| worst(context, error))?;
        let count = usize::try_from(count).unwrap_or(0).min(ANSWERS);
        // SAFETY: the library has written so many, from the first on.
        let mut found = answers[..count].iter().map(|answer| unsafe { answer.assume_init_ref() });
        let usable = found.find(|answer| {
            answer.state == Status::CUBLAS_STATUS_SUCCESS && answer.workspaceSize <= question.workspace_bytes
        });
        let Some(answer) = usable else {
            let text = format!("expected an algorithm of cublasLt for a {}, found none", Sizes(question));
            return Err(KernelError::Unsupported(text));
        };
        let choice = answer.algo;
        self.choices.lock().unwrap_or_else(PoisonError::into_inner).keep(*question, choice);
        Ok(choice)
    }

    /// # Safety
    /// As [`run`](Self::run).
    unsafe fn multiply(
        &self,
        stream: CUstream,
        gemm: &Gemm,
        problem: &Problem,
        choice: &sys::cublasLtMatmulAlgo_t,
    ) -> Status {
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: descriptions and factors live until the call returns; the memory is what the caller says.
        unsafe {
            sys::cublasLtMatmul(
                self.handle.0,
                problem.product.0,
                (&raw const one).cast(),
                pointer(gemm.w),
                problem.w.0,
                pointer(gemm.x),
                problem.x.0,
                (&raw const zero).cast(),
                pointer(gemm.out),
                problem.out.0,
                pointer(gemm.out).cast_mut(),
                problem.out.0,
                choice,
                pointer(gemm.workspace).cast_mut(),
                gemm.workspace_bytes,
                stream.cast(),
            )
        }
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: created once; nothing runs any more.
        let _ = unsafe { sys::cublasLtDestroy(self.handle.0) };
    }
}

/// The descriptions of one product and its matrices.
struct Problem {
    product: Description,
    w: Matrix,
    x: Matrix,
    out: Matrix,
}

impl Problem {
    fn new(question: &Question, bias: Ptr) -> Result<Self> {
        let Question { element, out_element, m, n, k, out_stride, multiprocessors, .. } = *question;
        let product = Description::new()?;
        product.set(Detail::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED)?;
        if bias != Ptr::NULL {
            product.set(Detail::CUBLASLT_MATMUL_DESC_EPILOGUE, Epilogue::CUBLASLT_EPILOGUE_BIAS)?;
            product.set(Detail::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, data_type(element))?;
            product.set(Detail::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.0)?;
        }
        // On a part of the device the library would cut the work for all of it.
        if multiprocessors != 0 {
            let count = i32::try_from(multiprocessors).expect("some hundred at most");
            product.set(Detail::CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, count)?;
        }
        Ok(Problem {
            product,
            w: Matrix::new(element, k, n, k)?,
            x: Matrix::new(element, k, m, k)?,
            out: Matrix::new(out_element, n, m, out_stride)?,
        })
    }
}

/// What is done with the matrices.
struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new() -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, DataType::CUDA_R_32F);
        // SAFETY: the pointer is to a local of the type that is written.
        let status = unsafe { sys::cublasLtMatmulDescCreate(&raw mut raw, compute, scale) };
        check("cublasLtMatmulDescCreate", status)?;
        Ok(Description(raw))
    }

    /// `value` is of the attribute's type: enums of 32 bits, and an address.
    fn set<T>(&self, attribute: Detail, value: T) -> Result<()> {
        let bytes = (&raw const value).cast::<c_void>();
        // SAFETY: the description lives; the value is as long as said and is copied.
        let status = unsafe { sys::cublasLtMatmulDescSetAttribute(self.0, attribute, bytes, size_of::<T>()) };
        check(format_args!("cublasLtMatmulDescSetAttribute of {attribute:?}"), status)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: created once.
        let _ = unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

/// A matrix by columns, as the library sees it.
struct Matrix(sys::cublasLtMatrixLayout_t);

impl Matrix {
    fn new(element: Element, rows: usize, columns: usize, stride: usize) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        let stride = i64::try_from(stride).expect("matrices fit the memory");
        // SAFETY: the pointer is to a local of the type that is written.
        let status = unsafe {
            sys::cublasLtMatrixLayoutCreate(&raw mut raw, data_type(element), rows as u64, columns as u64, stride)
        };
        check("cublasLtMatrixLayoutCreate", status)?;
        Ok(Matrix(raw))
    }
}

impl Drop for Matrix {
    fn drop(&mut self) {
        // SAFETY: created once.
        let _ = unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

/// What an algorithm has to keep to.
struct Wishes(sys::cublasLtMatmulPreference_t);

impl Wishes {
    fn new(question: &Question) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is to a local of the type that is written.
        let status = unsafe { sys::cublasLtMatmulPreferenceCreate(&raw mut raw) };
        check("cublasLtMatmulPreferenceCreate", status)?;
        let wishes = Wishes(raw);
        let [x, w, out] = question.alignments;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, question.workspace_bytes as u64)?;
        // Partial sums stay f32 until they are added up.
        let reductions = Reduction::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions)?;
        // Unless told otherwise the library takes all addresses to be multiples of 256.
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, w)?;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x)?;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out)?;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out)?;
        Ok(wishes)
    }

    /// As of [`Description::set`].
    fn set<T>(&self, attribute: Wish, value: T) -> Result<()> {
        let bytes = (&raw const value).cast::<c_void>();
        // SAFETY: the preference lives; the value is as long as said and is copied.
        let status = unsafe { sys::cublasLtMatmulPreferenceSetAttribute(self.0, attribute, bytes, size_of::<T>()) };
        check(format_args!("cublasLtMatmulPreferenceSetAttribute of {attribute:?}"), status)
    }
}

impl Drop for Wishes {
    fn drop(&mut self) {
        // SAFETY: created once.
        let _ = unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

fn data_type(element: Element) -> DataType {
    match element {
        Element::F32 => DataType::CUDA_R_32F,
        Element::F16 => DataType::CUDA_R_16F,
        Element::BF16 => DataType::CUDA_R_16BF,
    }
}

fn pointer(of: Ptr) -> *const c_void {
    // An address of the device: nothing on the host reads there.
    std::ptr::without_provenance(usize::try_from(of.0).expect("64-bit addresses"))
}

/// The result of a call of the library; `call` is only written out if it failed.
fn check(call: impl Display, status: Status) -> Result<()> {
    if status == Status::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    Err(KernelError::Driver { call: call.to_string(), status: format!("{status:?}") })
}

/// The library says of a lost device only that something failed; the driver says that it is lost.
fn worst(context: &Context, error: KernelError) -> KernelError {
    match context.free_bytes() {
        Err(lost @ KernelError::DeviceLost { .. }) => lost,
        _ => error,
    }
}

/// A call and what it was for.
struct Named<'a>(&'static str, &'a Question);

impl Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of a {}", self.0, Sizes(self.1))
    }
}

/// A product in words.
struct Sizes<'a>(&'a Question);

impl Display for Sizes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Question { element, out_element, m, n, k, bias, .. } = self.0;
        let with = if *bias { " with bias" } else { "" };
        write!(f, "product [{m} x {k}] [{k} x {n}]{with} of {element} into {out_element}")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn gemm(element: Element, bias: Ptr) -> Gemm {
        Gemm {
            element,
            out_element: Element::F32,
            x: Ptr(256),
            w: Ptr(512),
            bias,
            out: Ptr(1024),
            m: 5,
            n: 7,
            k: 3,
            out_stride: 8,
            multiprocessors: 48,
            workspace: Ptr::NULL,
            workspace_bytes: 0,
        }
    }

    #[test]
    fn products_are_named_by_their_sizes() {
        let question = Question::exact(&gemm(Element::BF16, Ptr(768)));
        let error = check(Named("cublasLtMatmul", &question), Status::CUBLAS_STATUS_NOT_SUPPORTED);
        let expected =
            "cublasLtMatmul of a product [5 x 3] [3 x 7] with bias of bf16 into f32: CUBLAS_STATUS_NOT_SUPPORTED";
        assert_eq!(error.unwrap_err().to_string(), expected);
        assert!(check("cublasLtCreate", Status::CUBLAS_STATUS_SUCCESS).is_ok());
    }

    /// Needs the library, but no GPU.
    #[test]
    fn the_library_takes_every_description() {
        // SAFETY: as in `Products::open`.
        if !unsafe { sys::is_culib_present() } {
            println!("skipped: there is no libcublasLt on this machine");
            return;
        }
        // SAFETY: no preconditions.
        let version = unsafe { sys::cublasLtGetVersion() };
        assert!((120_000..200_000).contains(&version), "{version}");
        for element in [Element::F32, Element::F16, Element::BF16] {
            for bias in [Ptr::NULL, Ptr(768)] {
                let question = Question::exact(&gemm(element, bias));
                Problem::new(&question, bias).unwrap();
                Wishes::new(&question).unwrap();
            }
        }
        // What it does not take it says.
        let description = Description::new().unwrap();
        let error = description.set(Detail::CUBLASLT_MATMUL_DESC_TRANSA, 0_u8).unwrap_err();
        assert!(error.to_string().ends_with("CUBLAS_STATUS_INVALID_VALUE"), "{error}");
    }
}
