//! Matrices as the hardware that copies boxes of them wants them described.

use std::ffi::c_void;

use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType as DataType, CUtensorMapFloatOOBfill as OutOfBounds,
    CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion, CUtensorMapSwizzle as Swizzle,
};

use super::context::Context;
use crate::Result;
use crate::cuda::driver::{BoxedMatrix, Element, TensorMap};

/// Describes a matrix, columns before rows, as the driver counts dimensions. It needs no memory of the device.
pub(super) fn encode(context: &Context, matrix: &BoxedMatrix) -> Result<TensorMap> {
    matrix.check()?;
    let BoxedMatrix { element, memory, rows, columns, box_rows, box_columns } = *matrix;
    let mut map = CUtensorMap { opaque: [0; 16] };
    let element_type = match element {
        Element::F16 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        // There is none of F32, as was checked.
        Element::F32 | Element::BF16 => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let swizzle = match box_columns {
        32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let sizes = [columns as u64, rows as u64];
    // Between rows alone: elements of a row lie side by side.
    let row_bytes = [(columns * element.bytes()) as u64];
    let box_sizes = [box_columns as u32, box_rows as u32];
    // SAFETY: the arrays are as long as two dimensions need, and the map is a local; the address is only written down.
    let status = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            element_type,
            2,
            memory.0 as *mut c_void,
            sizes.as_ptr(),
            row_bytes.as_ptr(),
            box_sizes.as_ptr(),
            [1, 1].as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            OutOfBounds::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    context.check(format_args!("cuTensorMapEncodeTiled of {matrix:?}"), status)?;
    Ok(TensorMap { words: map.opaque })
}
