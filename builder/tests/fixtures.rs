//! The builder on two small device crates: `good` keeps every rule, `bad` breaks each once.
//!
//! Tests that need a device toolchain or ptxas say so and pass where there is none.

use peerlane_builder::{
    Arch, BuildError, CudaBuilder, Defect, Expected, Finding, Origin, Ptxas, Report, Search,
};
use std::fs;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixture").join(name)
}

/// The cache that cargo builds use too: compiling `core` is most of the time of these tests.
fn cache() -> PathBuf {
    let tests = Path::new(env!("CARGO_TARGET_TMPDIR"));
    tests.parent().unwrap_or(tests).join("peerlane-device")
}

fn kernels(list: &[(&str, usize)]) -> Vec<Expected> {
    let expected =
        |&(symbol, barriers): &(&str, usize)| Expected { symbol: symbol.to_owned(), barriers };
    list.iter().map(expected).collect()
}

fn good() -> CudaBuilder {
    let expected = kernels(&[("good_barrier", 1), ("good_atomic", 0), ("good_bytes", 0)]);
    CudaBuilder::new(fixture("good")).cache(cache()).expect(expected)
}

/// An empty folder of this test's own.
fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("the target folder is writable");
    folder
}

/// The result, or none where this machine has no device toolchain.
fn unless_no_toolchain<T>(result: Result<T, BuildError>) -> Option<Result<T, BuildError>> {
    if let Err(error @ BuildError::NoToolchain { .. }) = &result {
        eprintln!("skipped: {error}");
        return None;
    }
    Some(result)
}

#[test]
fn a_good_crate_builds_for_every_variant() {
    let out = scratch("good");
    let Some(reports) = unless_no_toolchain(good().build_all(&out, "kernels_")) else { return };
    let reports = reports.expect("the crate keeps every rule");
    assert_eq!(reports.iter().map(|report| report.arch).collect::<Vec<_>>(), Arch::ALL);
    for report in &reports {
        let path = out.join(format!("kernels_{}.ptx", report.arch));
        let ptx = fs::read_to_string(path).expect("build_all wrote it");
        assert_eq!(ptx, report.ptx);
        assert!(ptx.starts_with(&format!("// peerlane sources {}\n", report.sources)));
        assert!(ptx.contains(&format!(".target {}", report.arch)));
        assert_eq!(
            ptx.matches(".maxntid 256, 1, 1\n.minnctapersm 2\n{").count(),
            3,
            "one bound per entry"
        );
        assert!(matches!(report.origin, Origin::Compiled(_)));
        assert_eq!(report.kernels.len(), 3);
        let asked = report.kernels.iter().all(|kernel| kernel.registers.is_some());
        assert_eq!(asked, report.ptxas.is_some());
    }
}

#[test]
fn a_second_build_gives_the_same_text_and_leaves_the_file_alone() {
    let path = scratch("twice").join("good.ptx");
    let build = || good().arch(Arch::Sm80).copy_to(&path).build();
    let Some(first) = unless_no_toolchain(build()) else { return };
    let written = || fs::metadata(&path).and_then(|data| data.modified()).expect("it is there");
    let (first, time) = (first.expect("it builds"), written());
    let second = build().expect("it builds again");
    assert_eq!((first.ptx, first.kernels), (second.ptx, second.kernels));
    assert_eq!(time, written());
}

#[test]
fn every_broken_rule_is_found_under_the_kernels_name() {
    let expected = [
        ("bad_barrier", 1),
        ("bad_reference", 0),
        ("bad_atomic", 0),
        ("bad_extern", 0),
        ("bad_copy", 0),
        ("bad_stack", 0),
        ("bad_missing", 0),
    ];
    let builder = CudaBuilder::new(fixture("bad")).cache(cache()).expect(kernels(&expected));
    let Some(result) = unless_no_toolchain(builder.build()) else { return };
    let error = result.expect_err("each kernel breaks a rule");
    let message = error.to_string();
    let BuildError::Verification { arch: Arch::Sm80, findings } = error else {
        panic!("another error: {message}")
    };
    let found = |kernel: &str, is: fn(&Defect) -> bool| {
        let mut all = findings.iter().filter(|finding| finding.kernel == kernel);
        assert!(all.any(|finding| is(&finding.defect)), "{kernel} is not in\n{message}");
        assert!(message.contains(kernel));
    };
    found("bad_barrier", |d| *d == Defect::Barriers { expected: 1, found: 2 });
    found("bad_reference", |d| matches!(d, Defect::NonCoherentLoad(_)));
    found("bad_atomic", |d| matches!(d, Defect::UnscopedAtomic(_)));
    found("bad_extern", |d| *d == Defect::Unresolved("defined_nowhere".to_owned()));
    found("bad_copy", |d| matches!(d, Defect::ByteCopy(_)));
    found("bad_stack", |d| matches!(d, Defect::LocalMemory(_)));
    found("bad_missing", |d| *d == Defect::Missing);
    found("bad_stranger", |d| *d == Defect::Unexpected);
}

#[test]
fn every_variant_that_fails_is_named() {
    let builder = CudaBuilder::new(fixture("bad")).cache(cache()).expect(Vec::new());
    let Some(result) = unless_no_toolchain(builder.check_all()) else { return };
    let message = result.expect_err("each kernel breaks a rule").to_string();
    for arch in Arch::ALL {
        assert!(message.contains(&format!("the PTX for {arch} breaks")), "{message}");
    }
}

#[test]
fn a_crate_that_does_not_compile_shows_what_rustc_said() {
    let device = scratch("broken");
    fs::create_dir(device.join("src")).expect("the folder is empty");
    fs::write(device.join("src/lib.rs"), "#![no_std]\nfn f() -> u32 { true }\n").expect("as above");
    let builder = CudaBuilder::new(&device).cache(cache());
    let Some(result) = unless_no_toolchain(builder.prebuilt(None).build()) else { return };
    let message = result.expect_err("it is a type error").to_string();
    assert!(message.contains("could not compile the device crate for sm_80"), "{message}");
    assert!(message.contains("mismatched types"), "{message}");
}

#[test]
fn prebuilt_ptx_is_used_only_with_its_own_sources() {
    let device = scratch("prebuilt");
    fs::create_dir_all(device.join("src")).expect("the folder is empty");
    for file in ["src/lib.rs", "src/verbs.rs"] {
        fs::copy(fixture("good").join(file), device.join(file)).expect("the fixture has it");
    }
    let builder = || {
        let expected = kernels(&[("good_barrier", 1), ("good_atomic", 0), ("good_bytes", 0)]);
        CudaBuilder::new(&device).cache(cache()).expect(expected)
    };
    let absent = builder().search(Search::nowhere()).build().expect_err("nothing is there");
    assert!(absent.to_string().contains("no prebuilt PTX at"), "{absent}");

    let update = builder().prebuilt(None).build_all(&device.join("ptx"), "");
    let Some(compiled) = unless_no_toolchain(update) else { return };
    let compiled = compiled.expect("the crate keeps every rule");

    let nowhere = Search { named: None, candidates: vec!["/no/such/rustc".into()] };
    let loaded = builder().search(nowhere).check_all().expect("the files are fresh");
    assert_eq!(loaded[1].ptx, compiled[1].ptx);
    assert!(matches!(loaded[1].origin, Origin::Prebuilt(_)));
    assert!(loaded[1].warnings[0].contains("/no/such/rustc: it does not start"));

    let source = device.join("src/verbs.rs");
    let text = fs::read_to_string(&source).expect("it was copied");
    fs::write(&source, text + "// one more comment\n").expect("it was copied");
    let stale = builder().search(Search::nowhere()).build().expect_err("the sources have changed");
    let message = stale.to_string();
    assert!(matches!(stale, BuildError::StalePrebuilt { .. }), "{message}");
    assert!(message.contains("sm_80.ptx is stale") && message.contains("update"), "{message}");
}

/// Builds from a prebuilt file that holds an entry `k` with this body, and has the right hash.
fn prebuilt_kernel(name: &str, body: &str) -> Result<Report, BuildError> {
    let device = scratch(name);
    let file = device.join("ptx/sm_80.ptx");
    for folder in ["src", "ptx"] {
        fs::create_dir_all(device.join(folder)).expect("the folder is empty");
    }
    fs::write(device.join("src/lib.rs"), "#![no_std]\n").expect("as above");
    fs::write(&file, "// peerlane sources 0\n").expect("as above");
    let builder = CudaBuilder::new(&device).cache(cache()).search(Search::nowhere());
    let builder = builder.expect(kernels(&[("k", 0)]));
    let Err(BuildError::StalePrebuilt { expected, .. }) = builder.clone().build() else {
        panic!("the hash is made up")
    };
    let head = format!("// peerlane sources {expected}\n// compiled by hand\n");
    let module = ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n\
                  .maxntid 512, 1, 1\n";
    fs::write(&file, format!("{head}{module}{{\n{body}\nret;\n}}\n")).expect("as above");
    builder.build()
}

#[test]
fn prebuilt_ptx_is_verified_like_any_other() {
    let Err(BuildError::Verification { findings, .. }) = prebuilt_kernel("edited", "bar.sync 0;")
    else {
        panic!("it has a barrier too many")
    };
    let defect = Defect::Barriers { expected: 0, found: 1 };
    assert_eq!(findings, [Finding { kernel: "k".to_owned(), defect }]);
}

#[test]
fn what_only_ptxas_sees_is_found_too() {
    if Ptxas::find().expect("PEERLANE_PTXAS is right or unset").is_none() {
        eprintln!("skipped: no ptxas");
        return;
    }
    let unknown = prebuilt_kernel("unknown", "made.up %r1;");
    assert!(matches!(unknown, Err(BuildError::Ptxas { arch: Arch::Sm80, .. })), "{unknown:?}");

    // 200 values that live at once, where 512 threads leave 128 registers to each.
    let each = |line: fn(u32) -> String| (0..200).map(line).collect::<String>();
    let loads = each(|i| format!("ld.volatile.global.u32 %r{i}, [%rd0];\n"));
    let stores = each(|i| format!("st.volatile.global.u32 [%rd0], %r{i};\n"));
    let declarations = ".reg .b32 %r<200>; .reg .b64 %rd<1>; mov.b64 %rd0, 4096;\n";
    let crowded = prebuilt_kernel("crowded", &format!("{declarations}{loads}{stores}"));
    let Err(BuildError::Verification { findings, .. }) = crowded else { panic!("{crowded:?}") };
    assert!(findings.iter().all(|finding| finding.kernel == "k"));
    assert!(findings.iter().any(|finding| matches!(finding.defect, Defect::Spills(_))));
}

#[test]
fn a_folder_without_a_crate_is_named() {
    let error = CudaBuilder::new("/no/such/crate").build().expect_err("nothing is there");
    assert!(error.to_string().starts_with("/no/such/crate is not a device crate"), "{error}");
}
