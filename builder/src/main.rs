//! `peerlane-builder`: the builder on the command line.
//!
//! Invariant: it does what host/build.rs does, through the same calls. The exit status is 0 only
//! if every variant passed every check.

use clap::{Parser, Subcommand};
use peerlane_builder::{BuildError, CudaBuilder, Flavor, Origin, Report, Search};
use std::path::PathBuf;
use std::process::ExitCode;

/// Compiles Peerlane's device crate to PTX and checks what came out.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Folder of the device crate.
    #[arg(long, global = true, default_value = "device")]
    device: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write all variants into a folder, as kernels_sm_75.ptx and so on.
    Build {
        /// The folder.
        #[arg(long)]
        out: PathBuf,
        /// A feature of the device crate that is not shipped: without deadlines, to measure their cost.
        #[arg(long)]
        unbounded: bool,
    },
    /// Check all variants, with ptxas, and print what each kernel needs.
    Check {
        /// Check the PTX that is checked in under device/ptx, and that it is of these sources.
        #[arg(long)]
        prebuilt: bool,
    },
    /// Compile the PTX that is checked in under device/ptx anew.
    Update,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), BuildError> {
    let builder = |flavor| CudaBuilder::new(&cli.device).flavor(flavor);
    match &cli.command {
        Command::Build { out, unbounded } => {
            let flavors: &[Flavor] =
                if *unbounded { &[Flavor::Unbounded] } else { &Flavor::SHIPPED };
            let build = |flavor: &Flavor| builder(*flavor).build_all(out, "kernels_");
            let reports = all(flavors.iter().map(build))?;
            println!("wrote {} variants to {}", reports.len(), out.display());
        }
        Command::Check { prebuilt } => {
            let check = |flavor| {
                let builder = builder(flavor).require_ptxas();
                let nowhere = Search::nowhere();
                let builder =
                    if *prebuilt { builder.search(nowhere) } else { builder.prebuilt(None) };
                builder.check_all()
            };
            let flavors: &[Flavor] = if *prebuilt { &Flavor::SHIPPED } else { &Flavor::ALL };
            print_table(&all(flavors.iter().copied().map(check))?);
        }
        Command::Update => {
            let folder = cli.device.join("ptx");
            let build = |flavor| builder(flavor).prebuilt(None).build_all(&folder, "");
            let reports = all(Flavor::SHIPPED.into_iter().map(build))?;
            let sources = reports.first().map(|report| report.sources.as_str());
            println!("{} holds sources {}", folder.display(), sources.unwrap_or_default());
        }
    }
    Ok(())
}

/// The reports of all flavors; prints their warnings.
fn all(
    reports: impl Iterator<Item = Result<Vec<Report>, BuildError>>,
) -> Result<Vec<Report>, BuildError> {
    let reports: Vec<Report> =
        reports.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
    warn(&reports);
    Ok(reports)
}

fn warn(reports: &[Report]) {
    for warning in Report::warnings(reports) {
        eprintln!("warning: {warning}");
    }
}

/// One line per kernel and variant, and one line per variant on where it came from.
fn print_table(reports: &[Report]) {
    let symbols = reports.iter().flat_map(|report| &report.kernels);
    let width = symbols.map(|kernel| kernel.symbol.len()).max().unwrap_or(0);
    println!("{:width$}  arch             registers  barriers  traps", "kernel");
    for report in reports {
        for kernel in &report.kernels {
            let registers = kernel.registers.map_or("-".to_owned(), |count| count.to_string());
            let (symbol, arch, barriers) = (&kernel.symbol, variant(report), kernel.barriers);
            let traps = kernel.traps;
            println!("{symbol:width$}  {arch:15}  {registers:>9}  {barriers:>8}  {traps:>5}");
        }
    }
    for report in reports {
        let origin = match &report.origin {
            Origin::Compiled(rustc) => format!("compiled by {rustc}"),
            Origin::Prebuilt(rustc) => format!("prebuilt by {rustc}"),
        };
        let ptxas = report.ptxas.as_ref().map_or("no ptxas".to_owned(), |ptxas| {
            format!("ptxas {} at {}", ptxas.version(), ptxas.path().display())
        });
        println!("{}: {} kernels, {origin}; {ptxas}", variant(report), report.kernels.len());
    }
}

/// The architecture and what the kernels were compiled to do.
fn variant(report: &Report) -> String {
    let feature = report.flavor.feature().map(|feature| format!(" {feature}"));
    format!("{}{}", report.arch, feature.unwrap_or_default())
}
