//! Reads PTX far enough to ask which functions it holds and which instructions those execute.
//!
//! Invariant: every instruction of every function body is seen, inline assembly included. The rest
//! of the language (types, registers, debug sections) is passed over.

use std::collections::{BTreeMap, BTreeSet};

/// A parsed file.
#[derive(Debug, Default)]
pub(crate) struct Module {
    /// Functions with a body, entries among them, in the order of the file.
    pub(crate) functions: Vec<Function>,
    /// Functions and variables that are declared here and defined nowhere.
    pub(crate) unresolved: BTreeSet<String>,
}

/// A function with a body.
#[derive(Debug)]
pub(crate) struct Function {
    /// Its symbol.
    pub(crate) name: String,
    /// Whether the host can launch it.
    pub(crate) entry: bool,
    /// Its instructions and directives, without labels, predicates and comments.
    pub(crate) statements: Vec<String>,
}

impl Module {
    /// Parses a file.
    pub(crate) fn parse(ptx: &str) -> Module {
        let mut module = Module::default();
        let mut declared = BTreeSet::new();
        for (head, body) in items(&without_comments(ptx)) {
            match (function_name(&head), body) {
                (Some((name, entry)), Some(body)) => {
                    module.functions.push(Function { name, entry, statements: statements(&body) });
                }
                (Some((name, _)), None) => {
                    declared.insert(name);
                }
                (None, _) => declared.extend(extern_global(&head)),
            }
        }
        for function in &module.functions {
            declared.extend(function.statements.iter().filter_map(|line| callee(line)));
        }
        for function in &module.functions {
            declared.remove(&function.name);
        }
        module.unresolved = declared;
        module
    }

    /// The launchable functions.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &Function> {
        self.functions.iter().filter(|function| function.entry)
    }

    /// `root` and every function that it reaches, calls through pointers included.
    pub(crate) fn reachable<'a>(&'a self, root: &'a Function) -> Vec<&'a Function> {
        let by_name: BTreeMap<&str, &Function> =
            self.functions.iter().map(|function| (function.name.as_str(), function)).collect();
        let mut seen = BTreeSet::from([root.name.as_str()]);
        let mut order = vec![root];
        let mut next = 0;
        while let Some(function) = order.get(next).copied() {
            for word in function.statements.iter().flat_map(|line| words(line)) {
                if let Some(target) = by_name.get(word)
                    && seen.insert(word)
                {
                    order.push(target);
                }
            }
            next += 1;
        }
        order
    }
}

impl Function {
    /// Whether the body mentions `symbol`.
    pub(crate) fn mentions(&self, symbol: &str) -> bool {
        self.statements.iter().any(|line| words(line).any(|word| word == symbol))
    }
}

/// The first word of a statement: `ld.global.b32`, or a directive such as `.local`.
pub(crate) fn opcode(statement: &str) -> &str {
    statement.split_whitespace().next().unwrap_or_default()
}

/// Identifiers and opcodes of a statement.
pub(crate) fn words(statement: &str) -> impl Iterator<Item = &str> {
    statement
        .split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '%' | '.')))
        .filter(|word| !word.is_empty())
}

/// The text without `//` and `/* */` comments.
fn without_comments(ptx: &str) -> String {
    let mut out = String::with_capacity(ptx.len());
    let mut rest = ptx;
    while let Some(start) = rest.find("//").into_iter().chain(rest.find("/*")).min() {
        out.push_str(&rest[..start]);
        let (end, skip) = if rest[start..].starts_with("//") { ("\n", 0) } else { ("*/", 2) };
        rest = rest[start..].find(end).map_or("", |at| &rest[start + at + skip..]);
    }
    out.push_str(rest);
    out
}

/// Splits a file into top-level items: what stands before the braces, and what stands in them.
fn items(ptx: &str) -> Vec<(String, Option<String>)> {
    let mut items = Vec::new();
    let (mut head, mut body, mut depth) = (String::new(), String::new(), 0usize);
    for c in ptx.chars() {
        match c {
            '}' if depth == 1 => {
                depth = 0;
                // The braces of an initialised variable end no item; its semicolon does.
                if function_name(&head).is_some() {
                    items.push((std::mem::take(&mut head), Some(std::mem::take(&mut body))));
                }
                body.clear();
            }
            '{' if depth == 0 => depth = 1,
            ';' if depth == 0 => items.push((std::mem::take(&mut head), None)),
            _ if depth == 0 => head.push(c),
            _ => {
                depth = depth + usize::from(c == '{') - usize::from(c == '}');
                body.push(c);
            }
        }
    }
    items
}

/// The symbol of a `.entry` or `.func` head, and whether it is an entry.
fn function_name(head: &str) -> Option<(String, bool)> {
    let at = |directive: &str| {
        let found = head.find(directive)? + directive.len();
        head[found..].starts_with([' ', '\t', '\n', '(']).then_some(&head[found..])
    };
    let (rest, entry) = match at(".entry") {
        Some(rest) => (rest, true),
        None => (at(".func")?, false),
    };
    let mut rest = rest.trim_start();
    if rest.starts_with('(') {
        // The value that a function returns comes before its name.
        rest = rest.split_once(')')?.1;
    }
    let name = words(rest).next()?;
    Some((name.to_owned(), entry))
}

/// The symbol of an `.extern .global` or `.extern .const` declaration. `.extern .shared` is the
/// block's dynamic shared memory, which the launch provides.
fn extern_global(head: &str) -> Option<String> {
    let all: Vec<&str> = words(head).collect();
    let unresolved = all.contains(&".extern") && !all.contains(&".shared");
    // `.extern .global .align 4 .b8 NAME[16]`: the name is the last word that is no number.
    let name = all.iter().rev().find(|word| !word.starts_with(|c: char| c.is_ascii_digit()))?;
    unresolved.then(|| (*name).to_owned())
}

/// The symbol that a direct call names.
fn callee(statement: &str) -> Option<String> {
    let (call, operands) = statement.split_once(char::is_whitespace)?;
    if call != "call" && call != "call.uni" {
        return None;
    }
    let mut operands = operands.trim_start();
    if operands.starts_with('(') {
        operands = operands.split_once(')')?.1;
    }
    let target = words(operands).next()?;
    (!target.starts_with('%')).then(|| target.to_owned())
}

/// The statements of a body, each without the scope braces, labels and predicate before it.
fn statements(body: &str) -> Vec<String> {
    body.split(';').map(bare).filter(|line| !line.is_empty()).collect()
}

/// One statement with its whitespace folded and everything before the opcode removed.
fn bare(statement: &str) -> String {
    let mut rest = statement.trim_start_matches(|c: char| c.is_whitespace() || "{}".contains(c));
    loop {
        let end = rest.find(|c: char| c.is_whitespace() || c == ':').unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        let skipped = if let Some(after_label) = tail.strip_prefix(':') {
            after_label
        } else if word.starts_with('@') {
            tail
        } else {
            break;
        };
        rest = skipped.trim_start_matches(|c: char| c.is_whitespace() || "{}".contains(c));
    }
    rest.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = r"
//
.version 7.0
.target sm_80
.address_size 64
.extern .func (.param .b32 func_retval0) missing
(
	.param .b64 missing_param_0
)
;
.func helper(.param .b64 p);
.extern .shared .align 16 .b8 DYNAMIC[];
.extern .global .align 4 .b8 TABLE[16];
.global .align 4 .b8 known[4] = {1, 2, 3, 4};
.visible .entry kernel(
	.param .u64 kernel_param_0
)
.maxntid 512, 1, 1
{
	.reg .pred 	%p<2>;
$L__BB0_1:                              // =>This { Inner Loop
	// begin inline asm
	{ .reg .b64 t; ld.param.u64 t,[kernel_param_0]; }
	// end inline asm
	@!%p1 bra 	$L__BB0_1;
	ld.global.v4.b32 	{%r1, %r2, %r3, %r4}, [%rd1];
	{ // callseq 0, 0
	.param .b32 retval0;
	call.uni (retval0), 
	missing, 
	(param0);
	} // callseq 0
	call.uni helper, (param0);
	ret;
}
.func helper(.param .b64 p)
{
	@%p1 bar.sync 	0;
	ret;
}
";

    #[test]
    fn functions_and_their_statements_are_found() {
        let module = Module::parse(SAMPLE);
        let names: Vec<_> = module.functions.iter().map(|f| (f.name.as_str(), f.entry)).collect();
        assert_eq!(names, [("kernel", true), ("helper", false)]);
        let kernel = &module.functions[0];
        for line in ["ld.param.u64 t,[kernel_param_0]", "bra $L__BB0_1", "ret"] {
            assert!(kernel.statements.iter().any(|found| found == line), "{line}: {kernel:?}");
        }
        assert!(kernel.statements.iter().any(|line| opcode(line) == "ld.global.v4.b32"));
        assert_eq!(module.functions[1].statements, ["bar.sync 0", "ret"]);
    }

    #[test]
    fn only_what_is_defined_nowhere_is_unresolved() {
        let unresolved = Module::parse(SAMPLE).unresolved;
        assert_eq!(unresolved, BTreeSet::from(["TABLE".to_owned(), "missing".to_owned()]));
    }

    #[test]
    fn calls_are_followed() {
        let module = Module::parse(SAMPLE);
        let reached: Vec<_> =
            module.reachable(&module.functions[0]).iter().map(|f| f.name.clone()).collect();
        assert_eq!(reached, ["kernel", "helper"]);
    }
}
