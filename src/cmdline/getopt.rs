//! Splits a command line into options exactly as `getopt_long` does for the reference: order kept,
//! long options abbreviated to any unambiguous prefix, `--opt value` and `--opt=value`, short
//! options in clusters, and the C library's error messages.
//!
//! The scan ends at the first error, as the reference's does, so that an option before the error
//! (`--version --bogus`) is still seen.

/// Whether an option takes a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// It takes none.
    None,
    /// It needs one.
    Required,
}

/// One option that exists.
#[derive(Clone, Copy, Debug)]
pub struct Spec<K> {
    /// Its long name, without the dashes.
    pub long: &'static str,
    /// Its one-letter name.
    pub short: Option<char>,
    /// Whether it takes a value.
    pub value: Value,
    /// What it means.
    pub kind: K,
}

/// One option that was given, or one argument that is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given<K> {
    /// Which option; `None` for an argument that is no option.
    pub kind: Option<K>,
    /// Its value; the empty string if it takes none, the argument itself if it is no option.
    pub value: String,
    /// The option as it stood on the command line, for messages.
    pub text: String,
}

/// Scans `args`, which does not hold the program's name. What was found before an error comes with
/// the error, whose text lacks the program's name in front.
pub fn scan<K: Copy>(specs: &[Spec<K>], args: &[String]) -> (Vec<Given<K>>, Option<String>) {
    let mut given = Vec::new();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let result = if arg == "--" {
            // What follows is no option. The reference drops it; we let the caller refuse it.
            given.extend(rest.map(|arg| operand(arg)));
            break;
        } else if let Some(long) = arg.strip_prefix("--") {
            scan_long(specs, arg, long, &mut rest).map(|option| given.push(option))
        } else if let Some(cluster) = arg.strip_prefix('-').filter(|c| !c.is_empty()) {
            scan_cluster(specs, arg, cluster, &mut rest, &mut given)
        } else {
            given.push(operand(arg));
            Ok(())
        };
        if let Err(message) = result {
            return (given, Some(message));
        }
    }
    (given, None)
}

fn operand<K>(arg: &str) -> Given<K> {
    Given {
        kind: None,
        value: arg.to_owned(),
        text: arg.to_owned(),
    }
}

fn scan_long<'a, K: Copy>(
    specs: &[Spec<K>],
    arg: &str,
    long: &str,
    rest: &mut impl Iterator<Item = &'a String>,
) -> Result<Given<K>, String> {
    let (name, inline) = match long.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (long, None),
    };
    let spec = find_long(specs, arg, name)?;
    match (spec.value, inline) {
        (Value::None, Some(_)) => Err(format!(
            "option '--{}' doesn't allow an argument",
            spec.long
        )),
        (Value::None, None) => Ok(found(spec, "", arg.to_owned())),
        (Value::Required, Some(value)) => Ok(found(spec, value, arg.to_owned())),
        (Value::Required, None) => {
            let value = rest
                .next()
                .ok_or_else(|| format!("option '--{}' requires an argument", spec.long))?;
            Ok(found(spec, value, format!("{arg} {value}")))
        }
    }
}

fn find_long<'s, K>(specs: &'s [Spec<K>], arg: &str, name: &str) -> Result<&'s Spec<K>, String> {
    if let Some(exact) = specs.iter().find(|spec| spec.long == name) {
        return Ok(exact);
    }
    let mut candidates = specs.iter().filter(|spec| spec.long.starts_with(name));
    let Some(first) = candidates.next() else {
        return Err(format!("unrecognized option '{arg}'"));
    };
    if candidates.next().is_none() {
        return Ok(first);
    }
    let mut message = format!("option '{arg}' is ambiguous; possibilities:");
    for spec in specs.iter().filter(|spec| spec.long.starts_with(name)) {
        message.push_str(&format!(" '--{}'", spec.long));
    }
    Err(message)
}

fn scan_cluster<'a, K: Copy>(
    specs: &[Spec<K>],
    arg: &str,
    cluster: &str,
    rest: &mut impl Iterator<Item = &'a String>,
    given: &mut Vec<Given<K>>,
) -> Result<(), String> {
    let mut letters = cluster.chars();
    while let Some(letter) = letters.next() {
        let Some(spec) = specs.iter().find(|spec| spec.short == Some(letter)) else {
            return Err(format!("invalid option -- '{letter}'"));
        };
        if spec.value == Value::None {
            given.push(found(spec, "", arg.to_owned()));
            continue;
        }
        let attached = letters.as_str();
        if attached.is_empty() {
            let value = rest
                .next()
                .ok_or_else(|| format!("option requires an argument -- '{letter}'"))?;
            given.push(found(spec, value, format!("{arg} {value}")));
        } else {
            given.push(found(spec, attached, arg.to_owned()));
        }
        return Ok(());
    }
    Ok(())
}

fn found<K: Copy>(spec: &Spec<K>, value: &str, text: String) -> Given<K> {
    Given {
        kind: Some(spec.kind),
        value: value.to_owned(),
        text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Kind {
        Blockdev,
        Block,
        Help,
        Trace,
    }

    const SPECS: &[Spec<Kind>] = &[
        spec("blockdev", None, Value::Required, Kind::Blockdev),
        spec("blocks", None, Value::Required, Kind::Block),
        spec("help", Some('h'), Value::None, Kind::Help),
        spec("trace", Some('T'), Value::Required, Kind::Trace),
    ];

    const fn spec(long: &'static str, short: Option<char>, value: Value, kind: Kind) -> Spec<Kind> {
        Spec {
            long,
            short,
            value,
            kind,
        }
    }

    fn scan_words(words: &[&str]) -> (Vec<(Option<Kind>, String)>, Option<String>) {
        let args: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let (given, error) = scan(SPECS, &args);
        let given = given.into_iter().map(|g| (g.kind, g.value)).collect();
        (given, error)
    }

    #[test]
    fn order_is_kept_and_both_forms_are_taken() {
        let (given, error) = scan_words(&["--trace=a", "x", "--blockdev", "b", "-Tc", "-T", "d"]);
        assert_eq!(error, None);
        assert_eq!(
            given,
            [
                (Some(Kind::Trace), "a".to_owned()),
                (None, "x".to_owned()),
                (Some(Kind::Blockdev), "b".to_owned()),
                (Some(Kind::Trace), "c".to_owned()),
                (Some(Kind::Trace), "d".to_owned()),
            ]
        );
    }

    #[test]
    fn unambiguous_prefix_names_the_option() {
        assert_eq!(scan_words(&["--tr", "a"]).0.len(), 1);
        assert_eq!(
            scan_words(&["--block", "a"]).1.as_deref(),
            Some("option '--block' is ambiguous; possibilities: '--blockdev' '--blocks'")
        );
    }

    #[test]
    fn errors_read_like_the_c_library_s() {
        for (words, message) in [
            (&["--bogus=1"][..], "unrecognized option '--bogus=1'"),
            (
                &["--blockdev"][..],
                "option '--blockdev' requires an argument",
            ),
            (
                &["--help=1"][..],
                "option '--help' doesn't allow an argument",
            ),
            (&["-hx"][..], "invalid option -- 'x'"),
            (&["-T"][..], "option requires an argument -- 'T'"),
        ] {
            assert_eq!(scan_words(words).1.as_deref(), Some(message));
        }
    }

    #[test]
    fn options_before_an_error_are_seen() {
        let (given, error) = scan_words(&["-h", "--bogus"]);
        assert_eq!(given, [(Some(Kind::Help), String::new())]);
        assert!(error.is_some());
    }

    #[test]
    fn value_may_look_like_an_option() {
        let (given, error) = scan_words(&["--blockdev", "--help"]);
        assert_eq!(error, None);
        assert_eq!(given, [(Some(Kind::Blockdev), "--help".to_owned())]);
    }

    #[test]
    fn dash_and_everything_after_two_dashes_is_no_option() {
        let (given, error) = scan_words(&["-", "--", "--help"]);
        assert_eq!(error, None);
        assert_eq!(given, [(None, "-".to_owned()), (None, "--help".to_owned())]);
    }

    #[test]
    fn text_is_the_option_as_given() {
        let args = ["--block=x", "-T", "y"].map(str::to_owned);
        let (given, _) = scan(&SPECS[2..], &args[1..]);
        assert_eq!(given[0].text, "-T y");
    }
}
