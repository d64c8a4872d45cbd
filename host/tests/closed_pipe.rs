//! What `peerlane` does once nobody reads its output, as in `peerlane topo | head`.

use std::process::Command;

#[test]
fn a_reader_that_goes_away_ends_the_program_without_a_word() {
    for line in ["topo --devices sim:2 --no-measure", "bench barrier --devices sim:2", "--help"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let run = Command::new(env!("CARGO_BIN_EXE_peerlane"))
            .args(line.split(' '))
            .stdout(writer)
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&run.stderr), "", "{line}");
        assert!(!run.status.success(), "{line}");
    }
}
