//! GPT-2's alphabet: each byte as one visible character, so that vocabularies can be text.
//!
//! Printable bytes stand for themselves, the other 68 for U+0100 and up in order (encoder.py of GPT-2).

/// Bytes that do not stand for themselves, counted below a byte, give its character.
fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The byte of a character, if it is of the alphabet.
fn byte_of(character: char) -> Option<u8> {
    let code = character as u32;
    if let Ok(byte) = u8::try_from(code) {
        return is_printable(byte).then_some(byte);
    }
    let hidden = code.checked_sub(0x100)?;
    match hidden {
        0..=32 => Some(hidden as u8),
        33..=66 => Some((hidden - 33 + 0x7F) as u8),
        67 => Some(0xAD),
        _ => None,
    }
}

/// The bytes of a token's text, or nothing if a character is not of the alphabet.
pub(super) fn to_bytes(token: &str) -> Option<Vec<u8>> {
    token.chars().map(byte_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_has_one_character() {
        let characters: Vec<(u8, char)> = (0..0x200u32)
            .filter_map(char::from_u32)
            .filter_map(|character| byte_of(character).map(|byte| (byte, character)))
            .collect();
        let mut bytes: Vec<u8> = characters.iter().map(|&(byte, _)| byte).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        for known in [(b' ', 'Ġ'), (b'\n', 'Ċ'), (b'\t', 'ĉ'), (b'a', 'a'), (0xAD, 'Ń')] {
            assert!(characters.contains(&known), "{known:?}");
        }
    }
}
