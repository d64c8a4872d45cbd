//! What the builder adds to the text that rustc printed: a header and launch bounds.
//!
//! Invariant: the first line of every PTX file of Peerlane names the sources it came from, and
//! every entry carries the launch bound that the host respects.

use peerlane_device::abi::MAX_THREADS;

/// How the first line starts; the hash of the sources follows.
const SOURCES: &str = "// peerlane sources ";

/// The launch bound of every entry, between its parameter list and its body.
///
/// Without `.maxntid` ptxas may use so many registers that a launch with [`MAX_THREADS`] is
/// refused. With it alone, ptxas chooses how many blocks should fit a multiprocessor, and rather
/// spills than use more registers than that allows; `.minnctapersm 2` says that two should.
pub(crate) fn launch_bound() -> String {
    format!("\n.maxntid {MAX_THREADS}, 1, 1\n.minnctapersm 2")
}

/// The finished file: header, then rustc's PTX with launch bounds and without comments.
pub(crate) fn finish(ptx: &str, sources: &str, rustc: &str) -> String {
    let bounded = with_launch_bounds(&without_comments(ptx));
    format!("{SOURCES}{sources}\n// compiled by {rustc}\n{bounded}")
}

/// The hash in the first line of a finished file.
pub(crate) fn sources_of(ptx: &str) -> Option<&str> {
    ptx.lines().next()?.strip_prefix(SOURCES)
}

/// The toolchain in the second line of a finished file.
pub(crate) fn compiler_of(ptx: &str) -> Option<&str> {
    ptx.lines().nth(1)?.strip_prefix("// compiled by ")
}

/// Removes what LLVM says about its own work: a third of the text, which every program that embeds
/// the kernels would carry.
fn without_comments(ptx: &str) -> String {
    let code = ptx.lines().map(|line| line.split("//").next().unwrap_or_default().trim_end());
    code.filter(|line| !line.is_empty()).flat_map(|line| [line, "\n"]).collect()
}

/// Adds the launch bound to every entry. rustc has no attribute for it.
fn with_launch_bounds(ptx: &str) -> String {
    let bound = launch_bound();
    let mut out = String::with_capacity(ptx.len() + 4096);
    let mut rest = ptx;
    while let Some(entry) = rest.find(".entry ") {
        let Some(close) = rest[entry..].find(')') else { break };
        let (head, tail) = rest.split_at(entry + close + 1);
        out.push_str(head);
        out.push_str(&bound);
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
        assert!(
            bounded.contains(".entry a()\n.maxntid 256, 1, 1\n.minnctapersm 2\n{"),
            "{bounded}"
        );
        assert!(
            bounded.contains("b_param_0[16]\n)\n.maxntid 256, 1, 1\n.minnctapersm 2\n{"),
            "{bounded}"
        );
        assert_eq!(bounded.matches(".maxntid").count(), 2);
    }

    #[test]
    fn comments_and_empty_lines_go() {
        let ptx = "//\n// LLVM\n\nadd x;\t// why\n\t// begin inline asm\n\tsub y;\n";
        assert_eq!(without_comments(ptx), "add x;\n\tsub y;\n");
    }

    #[test]
    fn the_header_is_read_back() {
        let finished = finish(TWO, "0123abcd", "rustc 1.96.0");
        assert_eq!(sources_of(&finished), Some("0123abcd"));
        assert_eq!(compiler_of(&finished), Some("rustc 1.96.0"));
        assert_eq!(sources_of(TWO), None);
    }
}
