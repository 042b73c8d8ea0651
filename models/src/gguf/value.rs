//! Metadata values of GGUF: 12 scalar types and arrays of them, arrays included.

/// One metadata value. Integers keep only their sign and value; arrays keep the width that the file has, so that what is
/// in memory stays a small multiple of what is in the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// u8, u16, u32 or u64.
    Unsigned(u64),
    /// i8, i16, i32 or i64.
    Signed(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// A metadata array: elements of one type.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
    /// Arrays of arrays; the inner ones may differ in type and length.
    Array(Vec<Array>),
}

impl Value {
    /// Any integer type, unless negative.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::Unsigned(value) => Some(value),
            Value::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    /// Any integer type, unless above `i64::MAX`.
    #[must_use]
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Value::Unsigned(value) => i64::try_from(value).ok(),
            Value::Signed(value) => Some(value),
            _ => None,
        }
    }

    /// f32, or f64 rounded to f32. An integer is not a float.
    #[must_use]
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Value::F32(value) => Some(value),
            Value::F64(value) => Some(value as f32),
            _ => None,
        }
    }

    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(value) => Some(value),
            _ => None,
        }
    }

    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(value) => Some(value),
            _ => None,
        }
    }

    #[must_use]
    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }

    /// An array of strings.
    #[must_use]
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Value::Array(Array::String(values)) => Some(values),
            _ => None,
        }
    }

    /// An array of any integer type, unless an element is above `i64::MAX`.
    #[must_use]
    pub fn as_ints(&self) -> Option<Vec<i64>> {
        match self.as_array()? {
            Array::U8(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::I8(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::U16(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::I16(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::U32(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::I32(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::U64(v) => v.iter().map(|&x| i64::try_from(x).ok()).collect(),
            Array::I64(v) => Some(v.clone()),
            _ => None,
        }
    }

    /// An array of f32, or of f64 rounded to f32.
    #[must_use]
    pub fn as_f32s(&self) -> Option<Vec<f32>> {
        match self.as_array()? {
            Array::F32(v) => Some(v.clone()),
            Array::F64(v) => Some(v.iter().map(|&x| x as f32).collect()),
            _ => None,
        }
    }

    /// An array of bools.
    #[must_use]
    pub fn as_bools(&self) -> Option<&[bool]> {
        match self {
            Value::Array(Array::Bool(values)) => Some(values),
            _ => None,
        }
    }

    /// What the value is, for messages: `a string`, `an array of 3 strings`.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Value::Unsigned(value) => format!("the integer {value}"),
            Value::Signed(value) => format!("the integer {value}"),
            Value::F32(value) => format!("the float {value}"),
            Value::F64(value) => format!("the float {value}"),
            Value::Bool(value) => format!("the bool {value}"),
            Value::String(value) => format!("the string {}", crate::error::quoted(value)),
            Value::Array(array) => format!("an array of {} {}", array.len(), array.element()),
        }
    }
}

impl Array {
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Array::U8(v) => v.len(),
            Array::I8(v) => v.len(),
            Array::U16(v) => v.len(),
            Array::I16(v) => v.len(),
            Array::U32(v) => v.len(),
            Array::I32(v) => v.len(),
            Array::U64(v) => v.len(),
            Array::I64(v) => v.len(),
            Array::F32(v) => v.len(),
            Array::F64(v) => v.len(),
            Array::Bool(v) => v.len(),
            Array::String(v) => v.len(),
            Array::Array(v) => v.len(),
        }
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn element(&self) -> &'static str {
        match self {
            Array::F32(_) | Array::F64(_) => "floats",
            Array::Bool(_) => "bools",
            Array::String(_) => "strings",
            Array::Array(_) => "arrays",
            _ => "integers",
        }
    }
}
