//! Ranks that are processes: a rank that does what it is told on its standard input, and the test
//! that tells it.
//!
//! Invariant: a rank answers every command with one line, `ok ...` or `error: ...`; a test waits
//! for that line no longer than it says. A rank ends with the test that started it.

use crate::group::{Memory, Rank};
use crate::job::{Call, random_jobs};
use crate::machine::{Links, small};
use crate::registered;
use crate::replay::Recorded;
use crate::script::Script;
use peerlane::cases::Rng;
use peerlane::gpu::{GpuRef, cuda, sim};
use peerlane::{
    Algorithm, AllReduce, Communicator, Config, DType, Error, Processes, Sizing, Transport,
};
use std::cmp::Ordering;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The argument that makes a test program a rank.
pub const RANK: &str = "be-a-rank";

/// Which GPUs the ranks get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gpus {
    /// Simulated ones. Every rank simulates the same machine.
    Sim {
        /// How many GPUs the machine has.
        devices: u32,
        /// Ordered pairs of which the first cannot reach the second.
        missing: Vec<(u32, u32)>,
        /// Ordered pairs whose stores get lost.
        lossy: Vec<(u32, u32)>,
    },
    /// The real ones, as many as there are.
    Cuda(u32),
}

impl Gpus {
    /// A simulated machine of 4 GPUs.
    pub fn sim() -> Gpus {
        Gpus::linked(4, Links::All)
    }

    /// A simulated machine with these links only.
    pub fn linked(devices: u32, links: Links) -> Gpus {
        Gpus::Sim { devices, missing: links.missing(devices), lossy: Vec::new() }
    }

    fn text(&self) -> String {
        let pairs = |pairs: &[(u32, u32)]| {
            let texts: Vec<_> = pairs.iter().map(|(a, b)| format!("{a}-{b}")).collect();
            texts.join(",")
        };
        match self {
            Gpus::Sim { devices, missing, lossy } => {
                format!("sim:{devices}:{}:{}", pairs(missing), pairs(lossy))
            }
            Gpus::Cuda(count) => format!("cuda:{count}"),
        }
    }

    fn open(text: &str, rank: u32) -> Result<GpuRef, Error> {
        let parts: Vec<&str> = text.split(':').collect();
        let count: u32 = parts[1].parse().expect("a number");
        let pair = |text: &str| {
            let (from, to) = text.split_once('-')?;
            Some((from.parse().ok()?, to.parse().ok()?))
        };
        let pairs = |text: &str| text.split(',').filter_map(pair).collect();
        if parts[0] == "cuda" {
            return cuda::device(rank % count);
        }
        let config = sim::Config {
            devices: count,
            autonomous: true,
            one_way: pairs(parts[2]),
            lossy: pairs(parts[3]),
            ..Default::default()
        };
        Ok(sim::devices(&config)[(rank % count) as usize].clone())
    }
}

/// What a rank is told when it starts.
#[derive(Clone, Debug)]
pub struct Start {
    /// The name of the meeting; empty for a rank that is told later where to meet.
    pub name: String,
    /// Its number.
    pub rank: u32,
    /// How many ranks it expects.
    pub world: u32,
    /// The GPUs of the group.
    pub gpus: Gpus,
    /// For how long it waits on the GPU.
    pub deadline: Duration,
    /// For how long it waits for the others to come.
    pub patience: Duration,
    /// What its environment says beside the test's.
    pub environment: Vec<(&'static str, String)>,
    /// What is to carry data.
    pub transport: Transport,
}

/// A rank, from the outside.
pub struct Process {
    child: Child,
    commands: ChildStdin,
    answers: Receiver<String>,
    /// How it was started.
    pub start: Start,
}

impl Process {
    /// Starts a rank, which joins at once if there is a name.
    pub fn start(start: &Start) -> Process {
        let program = std::env::current_exe().expect("a program knows its path");
        let mut child = Command::new(program)
            .args([RANK, &start.name, &start.rank.to_string(), &start.world.to_string()])
            .arg(start.gpus.text())
            .args([start.deadline, start.patience].map(|d| d.as_millis().to_string()))
            .arg(start.transport.name())
            .envs(start.environment.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a rank starts");
        let commands = child.stdin.take().expect("piped");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (sender, answers) = channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|l| sender.send(l)));
        Process { child, commands, answers, start: start.clone() }
    }

    /// The process's number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it something.
    pub fn tell(&mut self, command: &str) {
        writeln!(self.commands, "{command}").expect("the rank listens");
    }

    /// Its next answer.
    ///
    /// # Panics
    /// If none comes for a minute.
    pub fn answer(&self) -> String {
        match self.answers.recv_timeout(Duration::from_secs(60)) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("rank {} does not answer", self.start.rank),
            Err(RecvTimeoutError::Disconnected) => panic!("rank {} is gone", self.start.rank),
        }
    }

    /// Tells it something and waits for the answer.
    pub fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.answer()
    }

    /// Ends it with SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Tells it to end and waits until it has; returns whether it ended well.
    pub fn end(mut self) -> bool {
        self.tell("end");
        let until = Instant::now() + Duration::from_secs(30);
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("rank {} does not end", self.start.rank)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Is a rank: joins, then does what its standard input says.
pub fn serve(arguments: &[String]) -> ExitCode {
    let number = |index: usize| -> u64 { arguments[index].parse().expect("a number") };
    let (rank, world) = (number(1) as u32, number(2) as u32);
    let joined = Gpus::open(&arguments[3], rank).and_then(|gpu| {
        let Config { mailbox_bytes, max_blocks, .. } = small(world);
        let config = Config {
            deadline: Duration::from_millis(number(4)),
            mailbox_bytes,
            max_blocks,
            transport: arguments[6].parse().expect("a transport"),
            staging_bytes: Some(96 << 10),
            chunk_bytes: Some(512),
            sizing: Some(Sizing {
                least_mailbox_bytes: mailbox_bytes,
                most_mailbox_bytes: 16 << 20,
                least_staging_bytes: 96 << 10,
                patience: 1,
                ..Sizing::default()
            }),
            ..Config::from_environment()?
        };
        let patience = Duration::from_millis(number(5));
        let (ranks, recorded) = (HashMap::new(), None);
        let servant = Servant { gpu, config, patience, world, number: rank, ranks, recorded };
        if arguments[0].is_empty() {
            // As far as it can come alone.
            servant.gpu.load_kernels()?;
            return Ok(servant);
        }
        servant.joined("", &arguments[0])
    });
    let mut servant = match joined {
        Ok(servant) => servant,
        Err(error) => {
            println!("error: {error}");
            return ExitCode::SUCCESS;
        }
    };
    println!("ok joined");
    for line in std::io::stdin().lines().map_while(Result::ok) {
        if line == "end" {
            return ExitCode::SUCCESS;
        }
        match servant.obey(&line) {
            Ok(answer) => println!("ok {answer}"),
            Err(error) => println!("error: {error}"),
        }
    }
    ExitCode::SUCCESS
}

/// A rank's state between commands.
struct Servant {
    gpu: GpuRef,
    config: Config,
    patience: Duration,
    world: u32,
    number: u32,
    /// The communicators, by the word that begins a command.
    ranks: HashMap<String, Rank>,
    /// What was captured last to be replayed.
    recorded: Option<Recorded>,
}

impl Servant {
    fn joined(mut self, word: &str, name: &str) -> Result<Servant, Error> {
        self.join(word, name)?;
        Ok(self)
    }

    fn join(&mut self, word: &str, name: &str) -> Result<(), Error> {
        let meeting = Processes { name: name.into(), world: self.world, patience: self.patience };
        let (gpu, config) = (&self.gpu, &self.config);
        let rank = Rank::new(Communicator::join_processes(&meeting, self.number, gpu, config)?)?;
        self.ranks.insert(word.into(), rank);
        Ok(())
    }

    /// Does what `line` says. `@word` before a command names another communicator.
    fn obey(&mut self, line: &str) -> Result<String, String> {
        let (word, command) = match line.strip_prefix('@') {
            Some(rest) => rest.split_once(' ').ok_or("a command is missing")?,
            None => ("", line),
        };
        let parts: Vec<&str> = command.split(' ').collect();
        let number = |index: usize| parts[index].parse::<u64>().map_err(|e| e.to_string());
        let text = |error: Error| error.to_string();
        if parts[0] == "join" {
            return self.join(word, parts[1]).map(|()| "joined".into()).map_err(text);
        }
        let rank = self.ranks.get_mut(word).ok_or("no such communicator")?;
        match parts[0] {
            "script" => run_script(rank, number(1)?, number(2)? as usize, number(3)? as usize),
            "reduce" => reduce(rank, number(1)? as usize, None).map_err(text),
            "steps" => {
                let algorithm = parts[1].parse::<Algorithm>().map_err(|e| e.to_string())?;
                reduce(rank, number(2)? as usize, Some(algorithm)).map_err(text)
            }
            "registered" => {
                registered::reduce(rank, number(1)? as usize, number(2)? as usize).map_err(text)
            }
            "register" => registered::register(rank, number(1)? as usize, true).map_err(text),
            "register-unshared" => {
                registered::register(rank, number(1)? as usize, false).map_err(text)
            }
            "loop" => Ok(loop_until_error(rank, number(1)?)),
            "health" => rank.communicator.health().map(|()| "well".into()).map_err(text),
            "adapt" => {
                let adapted = rank.communicator.adapt().map_err(text)?;
                let (before, after) = (adapted.before.mailbox_bytes, adapted.after.mailbox_bytes);
                Ok(match after.cmp(&before) {
                    Ordering::Greater => "grown".into(),
                    Ordering::Equal => "as it was".into(),
                    Ordering::Less => "shrunk".into(),
                })
            }
            "deadline" => {
                rank.communicator.set_deadline(Duration::from_millis(number(1)?));
                Ok("set".into())
            }
            "capture" => capture(rank, number(1)? as usize).map_err(text),
            "record" => {
                self.recorded = Some(Recorded::new(rank, number(1)? as usize).map_err(text)?);
                Ok("recorded".into())
            }
            "replay" => {
                self.recorded.as_ref().ok_or("nothing is recorded")?.replay(rank).map_err(text)
            }
            "recover" => {
                rank.communicator.recover().map_err(text)?;
                Ok(format!("generation {}", rank.communicator.generation()))
            }
            "shrink" => {
                let without = parts[1..].iter().map(|part| part.parse::<u32>());
                let without = without.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
                rank.communicator.shrink(&without).map_err(text)?;
                let (number, world) = (rank.communicator.rank(), rank.communicator.world_size());
                Ok(format!("rank {number} of {world}"))
            }
            "transports" => transports(rank).map_err(text),
            "abort" => {
                rank.communicator.abort();
                Ok("aborted".into())
            }
            "close" => rank.communicator.close().map(|()| "closed".into()).map_err(text),
            other => Err(format!("{other}?")),
        }
    }
}

/// The ordered pairs between which host memory carries the data.
fn transports(rank: &Rank) -> Result<String, Error> {
    let ranks = 0..rank.communicator.world_size();
    let mut found = Vec::new();
    for (from, to) in ranks.clone().flat_map(|from| ranks.clone().map(move |to| (from, to))) {
        if from != to && rank.communicator.transport(from, to)? == Transport::Host {
            found.push(format!("{from}-{to}"));
        }
    }
    Ok(format!("by host: {}", found.join(",")))
}

/// An all-reduce of `count` numbers, waited for and compared.
fn reduce(rank: &mut Rank, count: usize, algorithm: Option<Algorithm>) -> Result<String, Error> {
    let (number, world) = (rank.communicator.rank(), rank.communicator.world_size());
    // Small whole numbers, whose sums no order of additions changes.
    let tensor = |value: &dyn Fn(usize) -> u32| -> Vec<u8> {
        (0..count).flat_map(|index| (value(index) as f32).to_le_bytes()).collect()
    };
    let before = tensor(&|index| number + 1 + (index % 7) as u32);
    let memory = Memory::with_image(&rank.gpu, rank.stream, &before)?;
    // A call that is refused must not free what is still being written.
    rank.gpu.stream_synchronize(rank.stream)?;
    let call = AllReduce { algorithm, ..AllReduce::in_place(memory.base, count, DType::F32) };
    // SAFETY: the memory has that size and lives until the stream is done.
    unsafe { rank.communicator.all_reduce(&call, rank.stream)? };
    rank.finish()?;
    let after = tensor(&|index| world * (world + 1) / 2 + world * (index % 7) as u32);
    assert!(memory.read(after.len())? == after, "rank {number} holds another sum");
    Ok("reduced".into())
}

/// Nanoseconds on the clock that all processes share.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Makes calls of all kinds, some waited for, until one fails; says when that was noticed, and the error.
fn loop_until_error(rank: &mut Rank, seed: u64) -> String {
    match loop_calls(rank, seed) {
        Ok((at, error)) => format!("failed {at} {error}"),
        Err(error) => format!("broken: {error}"),
    }
}

fn loop_calls(rank: &mut Rank, seed: u64) -> Result<(u64, Error), Error> {
    let world = rank.communicator.world_size();
    let jobs = random_jobs(world, 12, 40_000, &mut Rng::new(seed, "loop"));
    let script = Script::new(world, &jobs, seed);
    let image = &script.images[rank.communicator.rank() as usize].before;
    let memory = Memory::with_image(&rank.gpu, rank.stream, image)?;
    // A call that is refused must not free what is still being written.
    rank.gpu.stream_synchronize(rank.stream)?;
    let error = loop {
        let outcome = rank.issue_all(&script, memory.base).and_then(|()| rank.finish());
        if let Err(error) = outcome {
            break error;
        }
    };
    // Noted first: what is left of the calls may still write.
    let failed = (monotonic_ns(), error);
    rank.gpu.stream_synchronize(rank.stream)?;
    Ok(failed)
}

/// Captures an all-reduce of `count` numbers that never runs.
fn capture(rank: &mut Rank, count: usize) -> Result<String, Error> {
    let memory = Memory::with_image(&rank.gpu, rank.stream, &vec![0; 4 * count])?;
    rank.gpu.stream_synchronize(rank.stream)?;
    rank.gpu.capture_begin(rank.stream)?;
    let call = AllReduce::in_place(memory.base, count, DType::F32);
    // SAFETY: the graph is never launched.
    let queued = unsafe { rank.communicator.all_reduce(&call, rank.stream) };
    let graph = rank.gpu.capture_end(rank.stream)?;
    // SAFETY: made above and not used again.
    unsafe { rank.gpu.graph_destroy(graph)? };
    queued.map(|()| "captured".into())
}

/// `count` random calls with sizes up to `most` bytes, each byte compared. Answers with a hash of
/// what must be the same on all ranks.
fn run_script(rank: &mut Rank, seed: u64, count: usize, most: usize) -> Result<String, String> {
    let world = rank.communicator.world_size();
    let jobs = random_jobs(world, count, most, &mut Rng::new(seed, "processes"));
    let script = Script::new(world, &jobs, seed);
    let number = rank.communicator.rank() as usize;
    let image = &script.images[number].before;
    let text = |error: Error| error.to_string();
    let memory = Memory::with_image(&rank.gpu, rank.stream, image).map_err(text)?;
    rank.gpu.stream_synchronize(rank.stream).map_err(text)?;
    rank.issue_all(&script, memory.base).map_err(text)?;
    rank.finish().map_err(text)?;
    let found = memory.read(image.len()).map_err(text)?;
    script.verify_rank(number, &found)?;
    let mut hasher = DefaultHasher::new();
    for range in script.computed(number, |call| matches!(call, Call::AllReduce { .. })) {
        found[range].hash(&mut hasher);
    }
    Ok(format!("{:016x}", hasher.finish()))
}
