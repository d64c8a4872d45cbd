//! What the builder adds to the text that rustc printed: a header and launch bounds.
//!
//! Invariant: the first line of every PTX file of Peerlane names the sources it came from, and
//! every entry carries the launch bound that the host respects.

use peerlane_device::abi::MAX_THREADS;

/// How the first line starts; the hash of the sources follows.
const SOURCES: &str = "// peerlane sources ";

/// The finished file: header, then rustc's PTX with launch bounds on its entries.
pub(crate) fn finish(ptx: &str, sources: &str, rustc: &str) -> String {
    format!("{SOURCES}{sources}\n// compiled by {rustc}\n{}", with_launch_bounds(ptx))
}

/// The hash in the first line of a finished file.
pub(crate) fn sources_of(ptx: &str) -> Option<&str> {
    ptx.lines().next()?.strip_prefix(SOURCES)
}

/// The toolchain in the second line of a finished file.
pub(crate) fn compiler_of(ptx: &str) -> Option<&str> {
    ptx.lines().nth(1)?.strip_prefix("// compiled by ")
}

/// Adds `.maxntid` to every entry.
///
/// Without it ptxas may use so many registers that a launch with [`MAX_THREADS`] is refused. rustc
/// has no attribute for it, so it goes between the parameter list and the body.
fn with_launch_bounds(ptx: &str) -> String {
    let mut out = String::with_capacity(ptx.len() + 1024);
    let mut rest = ptx;
    while let Some(entry) = rest.find(".entry ") {
        let Some(close) = rest[entry..].find(')') else { break };
        let (head, tail) = rest.split_at(entry + close + 1);
        out.push_str(head);
        out.push_str(&format!("\n.maxntid {MAX_THREADS}, 1, 1"));
        rest = tail;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = ".version 7.0\n.visible .entry a()\n{\n\tret;\n}\n\
                       .visible .entry b(\n\t.param .align 8 .b8 b_param_0[16]\n)\n{\n\tret;\n}\n";

    #[test]
    fn every_entry_gets_the_bound_between_parameters_and_body() {
        let bounded = with_launch_bounds(TWO);
        assert!(bounded.contains(".entry a()\n.maxntid 512, 1, 1\n{"), "{bounded}");
        assert!(bounded.contains("b_param_0[16]\n)\n.maxntid 512, 1, 1\n{"), "{bounded}");
        assert_eq!(bounded.matches(".maxntid").count(), 2);
    }

    #[test]
    fn the_header_is_read_back() {
        let finished = finish(TWO, "0123abcd", "rustc 1.96.0");
        assert_eq!(sources_of(&finished), Some("0123abcd"));
        assert_eq!(compiler_of(&finished), Some("rustc 1.96.0"));
        assert_eq!(sources_of(TWO), None);
    }
}
