//! `--object help` and `--object TYPE,help`.

use super::class::{self, Class, Property};

/// The text to print instead of making an object, if the option's value asks for help.
pub fn text(value: &str) -> Option<String> {
    let words: Vec<&str> = value.split(',').collect();
    if value.starts_with('{') || !words.iter().any(|word| matches!(*word, "help" | "?")) {
        return None;
    }
    let asked = words.first().copied().unwrap_or_default();
    let asked = asked.strip_prefix("qom-type=").unwrap_or(asked);
    let creatable = class::creatable();
    Some(match creatable.iter().find(|class| class.name == asked) {
        Some(class) => of_type(class),
        None => {
            let mut text = "List of user creatable objects:\n".to_owned();
            for class in creatable {
                text.push_str(&format!("  {}\n", class.name));
            }
            text
        }
    })
}

fn of_type(class: &Class) -> String {
    let line = |property: &Property| format!("  {}=<{}>\n", property.name, property.kind);
    let writable = class
        .all_properties()
        .filter(|property| property.is_writable());
    let mut lines: Vec<String> = writable.map(line).collect();
    lines.sort();
    format!("{} options:\n{}", class.name, lines.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_and_their_properties_are_listed() {
        assert_eq!(text("iothread,id=a"), None);
        assert!(text("help").is_some_and(|text| text.contains("\n  iothread\n  main-loop\n")));
        assert_eq!(
            text("secret_keyring,help").as_deref(),
            Some(
                "secret_keyring options:\n  format=<QCryptoSecretFormat>\n  iv=<string>\n  \
                 keyid=<string>\n  serial=<int32_t>\n"
            )
        );
    }
}
