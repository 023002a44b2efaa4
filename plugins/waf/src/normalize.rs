//! One plain form of what attackers write in many: lower case, decoded, without comments and superfluous space.

use cairn_sdk::form_decode;

/// How often percent-encoding is taken off: attackers encode twice.
const DECODINGS: usize = 3;

/// The plain form of a text.
pub(crate) fn normalize(text: &[u8]) -> String {
    let mut bytes = text.to_vec();
    for _ in 0..DECODINGS {
        let decoded = form_decode(&bytes);
        if decoded == bytes {
            break;
        }
        bytes = decoded;
    }
    let text = String::from_utf8_lossy(&bytes).to_lowercase();
    squeeze(&entities(&text).replace('\\', "/"))
}

/// Takes comments away and makes one space of many, control characters included.
fn squeeze(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        if let Some(comment) = rest.strip_prefix("/*") {
            rest = comment.find("*/").map_or("", |end| &comment[end + 2..]);
            push_space(&mut plain);
            continue;
        }
        if next.is_whitespace() || next.is_control() {
            push_space(&mut plain);
        } else {
            plain.push(next);
        }
        rest = &rest[next.len_utf8()..];
    }
    plain
}

fn push_space(plain: &mut String) {
    if !plain.ends_with(' ') {
        plain.push(' ');
    }
}

/// Decodes HTML's numeric references and the few names that matter here.
fn entities(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('&') {
        plain.push_str(&rest[..start]);
        rest = &rest[start..];
        match reference(rest) {
            Some((character, length)) => {
                plain.push(character);
                rest = &rest[length..];
            }
            None => {
                plain.push('&');
                rest = &rest[1..];
            }
        }
    }
    plain.push_str(rest);
    plain
}

fn reference(text: &str) -> Option<(char, usize)> {
    for (name, character) in
        [("&lt;", '<'), ("&gt;", '>'), ("&quot;", '"'), ("&apos;", '\''), ("&colon;", ':')]
    {
        if text.starts_with(name) {
            return Some((character, name.len()));
        }
    }
    let digits = text.strip_prefix("&#")?;
    let (digits, radix, before) = digits.strip_prefix('x').map_or((digits, 10, 2), |hex| (hex, 16, 3));
    let count = digits.chars().take(8).take_while(|c| c.is_digit(radix)).count();
    let character = char::from_u32(u32::from_str_radix(&digits[..count], radix).ok()?)?;
    let end = usize::from(digits[count..].starts_with(';'));
    Some((character, before + count + end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disguises_come_off() {
        let cases = [
            ("UNION/**/SELECT", "union select"),
            ("%2527%20or", "' or"),
            ("a\u{0}\t \n b", "a b"),
            ("&#60;script&#x3e;&lt", "<script>&lt"),
            ("..%5c..%5cwin", "../../win"),
            ("&#xfffffffff;&#", "&#xfffffffff;&#"),
            ("/*open", " "),
            ("%zz&", "%zz&"),
        ];
        for (text, plain) in cases {
            assert_eq!(normalize(text.as_bytes()), plain, "{text}");
        }
    }
}
