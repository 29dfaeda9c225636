//! What may come next on a line, by what the monitor says of its commands.

use std::collections::BTreeMap;

use super::schema::{Member, Schema};

/// Words that the shell knows besides the monitor's commands.
pub const OWN_WORDS: &[&str] = &["exit", "help"];

/// Where the word to be completed starts, and what it may become. What ends in `=` or `.` goes on.
pub fn complete(schema: &Schema, line: &str) -> (usize, Vec<String>) {
    let start = line.rfind(char::is_whitespace).map_or(0, |at| at + 1);
    let (before, word) = line.split_at(start);
    let mut words = before.split_whitespace();
    let candidates = match words.next() {
        None => with_prefix(commands(schema), word),
        Some("help") => with_prefix(schema.commands().map(str::to_owned).collect(), word),
        Some(command) => match schema.arguments_of(command) {
            Some(kind) => {
                let given = words.filter_map(|word| word.split_once('='));
                let given = given.map(|(key, value)| (key.to_owned(), value.to_owned()));
                arguments(schema, kind, &given.collect(), word)
            }
            None => Vec::new(),
        },
    };
    (start, candidates)
}

fn commands(schema: &Schema) -> Vec<String> {
    let commands = schema.commands().chain(OWN_WORDS.iter().copied());
    commands.map(str::to_owned).collect()
}

fn with_prefix(mut candidates: Vec<String>, prefix: &str) -> Vec<String> {
    candidates.retain(|candidate| candidate.starts_with(prefix));
    candidates
}

/// What a word of arguments of that type may become.
fn arguments(
    schema: &Schema,
    kind: &str,
    given: &BTreeMap<String, String>,
    word: &str,
) -> Vec<String> {
    let (key, value) = match word.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (word, None),
    };
    let (path, name) = match key.rfind('.') {
        Some(at) => key.split_at(at + 1),
        None => ("", key),
    };
    let mut kind = kind.to_owned();
    let mut walked = String::new();
    for step in path.split_terminator('.') {
        let found = members(schema, &kind, given, &walked);
        let found = found.into_iter().find(|member| member.name == step);
        match found {
            Some(member) => kind = member.kind,
            // An index of a list, or nothing that is known.
            None => return Vec::new(),
        }
        walked.push_str(step);
        walked.push('.');
    }
    let members = members(schema, &kind, given, path);
    if let Some(value) = value {
        let member = members.into_iter().find(|member| member.name == name);
        let values = member.map(|member| schema.values(&member.kind));
        let values = values.unwrap_or_default().into_iter();
        let matching = values.filter(|candidate| candidate.starts_with(value));
        return matching.map(|value| format!("{key}={value}")).collect();
    }
    let mut candidates = Vec::new();
    for member in members {
        let key = format!("{path}{}", member.name);
        if !member.name.starts_with(name) || given.contains_key(&key) {
            continue;
        }
        if !schema.members(&member.kind, &BTreeMap::new()).is_empty() {
            candidates.push(format!("{key}."));
        }
        candidates.push(format!("{key}="));
    }
    candidates
}

/// The members of an object's type, by what is given of them below that path.
fn members(
    schema: &Schema,
    kind: &str,
    given: &BTreeMap<String, String>,
    path: &str,
) -> Vec<Member> {
    let below = given.iter().filter_map(|(key, value)| {
        let key = key.strip_prefix(path)?;
        Some((key.to_owned(), value.clone()))
    });
    schema.members(kind, &below.collect())
}

#[cfg(test)]
mod tests {
    use super::super::schema::tests::sample;
    use super::*;

    #[test]
    fn commands_members_and_values_are_completed() {
        let schema = sample();
        let complete = |line: &str| complete(&schema, line);
        assert_eq!(
            complete(""),
            (
                0,
                ["list", "open", "exit", "help"].map(str::to_owned).into()
            )
        );
        for (line, at, expected) in [
            ("o", 0, &["open"][..]),
            ("help l", 5, &["list"]),
            ("open ", 5, &["driver=", "read-only="]),
            ("open driver=", 5, &["driver=file", "driver=raw"]),
            ("open driver=r", 5, &["driver=raw"]),
            ("open read-only=o", 5, &["read-only=on", "read-only=off"]),
            (
                "open driver=file ",
                17,
                &["read-only=", "filename=", "sizes="],
            ),
            ("open driver=raw f", 16, &["file.", "file="]),
            ("open driver=raw file.d", 16, &["file.driver="]),
            (
                "open driver=raw file.driver=file file.f",
                33,
                &["file.filename="],
            ),
            ("open driver=raw none.x", 16, &[]),
            ("nope x", 5, &[]),
        ] {
            let expected: Vec<_> = expected.iter().map(|it| (*it).to_owned()).collect();
            assert_eq!(complete(line), (at, expected), "{line}");
        }
    }
}
