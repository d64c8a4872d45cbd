//! Playing a scene: the calls, the fault, what each rank ends with, and whether that is allowed.
//!
//! Invariant: what counts as a failure is decided here and nowhere else. A hang cannot be: the simulator makes an error
//! of one that it sees, and whoever plays scenes must watch the clock on the wall.

use super::class::Class;
use super::recovery::{After, recovers};
use super::scene::{DEADLINE, Kind, Place, Scene};
use super::tensors::Registered;
use crate::group::{Group, Memory, Rank};
use crate::job::Job;
use crate::script::Script;
use peerlane::cases::Rng;
use peerlane::gpu::GpuRef;
use peerlane::gpu::sim::{Fault, Harm, World};
use peerlane::{Communicator, Error};

/// A lane looks at the clock in every 128th turn of a wait, and the second look is the first that can end it. For how long
/// nothing has happened may nearly triple between two looks.
const OVERSHOOT: u64 = 20;
/// Simulated time within which waits end because of an abort word, which is looked at once a millisecond.
const TOLD_NS: u64 = 5_000_000;

/// What became of a scene.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All ranks hold the right result, and have no error.
    Right,
    /// Some rank has an error, and nobody without one holds anything wrong.
    Detected,
    /// A rank holds a wrong result and has no error, where nothing else is promised.
    Wrong,
}

/// What became of a scene, and how.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The scene's class.
    pub class: Class,
    /// Whether calls were checked.
    pub checked: bool,
    /// Whether the fault struck.
    pub struck: bool,
    /// How it ended.
    pub ending: Ending,
    /// The names of the errors that ranks had.
    pub errors: Vec<&'static str>,
    /// How the ranks went on.
    pub after: After,
}

/// A rank at the end: what is wrong with its result (`None`: nothing), or its error.
type End = Result<Option<Wrong>, Error>;

/// A wrong result, and the call, unless it is a registered tensor.
struct Wrong {
    job: Option<usize>,
    reason: String,
}

/// A group that has made its calls. What is dropped first stands first.
struct Played {
    group: Group,
    ends: Vec<End>,
    world: World,
    took_ns: u64,
    _memory: (Vec<Memory>, Option<Registered>),
}

/// Plays a scene without its fault and with it.
///
/// # Errors
/// What a library that keeps its promises does not do.
pub fn judge(scene: &Scene) -> Result<Vec<Verdict>, String> {
    let dry =
        play(scene, &scene.probes(), &Place::Nowhere).map_err(|error| format!("setup: {error}"))?;
    let well = |end: &End| matches!(end, Ok(None));
    // A busy machine makes deadlines pass that are real time.
    let late = scene.kind == Kind::Scheduled && dry.ends.iter().any(Result::is_err);
    if !late && !dry.ends.iter().all(well) {
        return Err(format!("without any fault: {}", describe(&dry.ends)));
    }
    let (occasions, took_ns) = (dry.world.occasions(), dry.took_ns);
    drop(dry);
    let right = Verdict {
        class: Class::None,
        checked: scene.config.checked,
        struck: false,
        ending: Ending::Right,
        errors: Vec::new(),
        after: After::Unneeded,
    };
    if late {
        return Ok(Vec::new());
    }
    if scene.class == Class::None {
        return Ok(vec![right]);
    }
    let verdict = try_fault(scene, &scene.place(&occasions), took_ns)?;
    Ok(vec![right, verdict])
}

/// Plays a scene with a fault at `place`; without it the calls take `took_ns`.
pub fn try_fault(scene: &Scene, place: &Place, took_ns: u64) -> Result<Verdict, String> {
    let faults = match place {
        Place::Machine(faults) => faults.as_slice(),
        _ => &[],
    };
    let mut played = play(scene, faults, place).map_err(|error| format!("setup: {error}"))?;
    let occasions = played.world.occasions();
    let struck = match place {
        Place::Nowhere => false,
        Place::Machine(faults) => {
            faults.iter().zip(&occasions).all(|(fault, n)| *n >= number(fault))
        }
        Place::Host { .. } => true,
    };
    let stopped = faults.iter().find_map(|fault| match *fault {
        Fault::Stop { gpu, .. } if struck => Some(gpu),
        _ => None,
    });
    let mut errors = check_ends(scene, &scene.jobs[0], &played.ends, stopped)?;
    let mut ending = if errors.is_empty() { Ending::Right } else { Ending::Detected };
    if played.ends.iter().any(|end| matches!(end, Ok(Some(_)))) {
        ending = Ending::Wrong;
    }
    check_bound(scene, &played, place, took_ns)?;
    let mut after = After::Unneeded;
    if ending == Ending::Right && matches!(place, Place::Machine(_)) {
        // What did not matter must not matter later either.
        let ends = again(&mut played.group, scene);
        errors = check_ends(scene, &scene.jobs[1], &ends, stopped)?;
        if !errors.is_empty() {
            ending = Ending::Detected;
        }
    }
    if ending == Ending::Detected {
        let Played { group, world, _memory, .. } = played;
        after = recovers(group, stopped, scene.seed)?;
        drop((_memory, world));
    }
    let checked = scene.config.checked;
    Ok(Verdict { class: scene.class, checked, struck, ending, errors, after })
}

/// The number of the turn or store at which a fault strikes.
fn number(fault: &Fault) -> u64 {
    match *fault {
        Fault::Stop { turn, .. } | Fault::Slow { turn, .. } => turn,
        Fault::Store { nth, .. } => nth,
    }
}

/// Makes all calls of a scene on a new machine.
fn play(scene: &Scene, faults: &[Fault], place: &Place) -> Result<Played, Error> {
    let machine = peerlane::gpu::sim::Config { faults: faults.to_vec(), ..scene.machine.clone() };
    let world = World::new(&machine);
    let gpus: Vec<GpuRef> =
        world.devices().into_iter().cycle().take(scene.world as usize).collect();
    let communicators = Communicator::connect(&gpus, &scene.config)?;
    let ranks = communicators.into_iter().map(Rank::new).collect::<Result<_, _>>()?;
    let mut group = Group { ranks };
    let script = Script::new(scene.world, &scene.jobs[0], scene.seed);
    let memory = group.load(&script)?;
    let registered = match &scene.tensors {
        Some(tensors) => Some(tensors.load(&mut group)?),
        None => None,
    };
    let before = world.statistics().clock_ns;
    let mut ends = issue(&mut group, scene, (&script, &memory, registered.as_ref()), place);
    collect(&group, scene, (&script, &memory, registered.as_ref()), &mut ends);
    let took_ns = world.statistics().clock_ns - before;
    if let Place::Host { rank, .. } = *place {
        // One that made only some of its calls has no right result to be compared with.
        ends[rank] = std::mem::replace(&mut ends[rank], Ok(None)).map(|_| None);
    }
    Ok(Played { group, ends, world, took_ns, _memory: (memory, registered) })
}

/// What the calls work on.
type Stage<'a> = (&'a Script, &'a [Memory], Option<&'a Registered>);

/// Queues all calls, in one order on all ranks; the machine moves a little now and then.
fn issue(group: &mut Group, scene: &Scene, stage: Stage<'_>, place: &Place) -> Vec<End> {
    let (script, memory, registered) = stage;
    let mut rng = Rng::new(scene.seed, "order");
    let world = group.ranks.len();
    let mut ends: Vec<End> = (0..world).map(|_| Ok(None)).collect();
    for call in 0..scene.calls() {
        let first = rng.below(world as u64) as usize;
        for rank in (first..first + world).map(|rank| rank % world) {
            if ends[rank].is_err() || is_absent(place, rank, call) {
                continue;
            }
            let issued = match (call.checked_sub(script.jobs.len()), &scene.tensors, registered) {
                (Some(index), Some(tensors), Some(registered)) => {
                    tensors.issue(group, registered, (rank, index))
                }
                _ => {
                    let at = (script.places[call][rank], memory[rank].base);
                    group.ranks[rank].issue(&script.jobs[call], at.0, at.1)
                }
            };
            ends[rank] = issued.map(|()| None);
        }
        if rng.below(4) == 0 {
            nudge(group, first);
        }
        strike(group, scene, place, call);
    }
    ends
}

/// Whether a rank does not make a call because of what has happened to its host.
fn is_absent(place: &Place, rank: usize, call: usize) -> bool {
    matches!(*place, Place::Host { rank: absent, call: first, .. } if rank == absent && call >= first)
}

/// Moves the machine a little. What that finds out, whoever waits finds out too.
fn nudge(group: &Group, rank: usize) {
    let rank = &group.ranks[rank];
    let _ = rank.gpu.stream_query(rank.stream);
}

/// After its first missing call: whether and when anybody notices what has become of a host.
fn strike(group: &Group, scene: &Scene, place: &Place, call: usize) {
    let Place::Host { rank, call: first, nudges } = *place else { return };
    if call != first {
        return;
    }
    for _ in 0..nudges {
        nudge(group, (rank + 1) % group.ranks.len());
    }
    let aborter = group.ranks[rank].communicator.aborter();
    match scene.class {
        _ if scene.mute => {}
        Class::ProcessDies => aborter.lose(rank as u32),
        Class::Abort => aborter.abort(),
        _ => {}
    }
}

/// Waits for all ranks and compares what they hold.
fn collect(group: &Group, scene: &Scene, stage: Stage<'_>, ends: &mut [End]) {
    let (script, memory, registered) = stage;
    for (rank, end) in ends.iter_mut().enumerate().filter(|(_, end)| end.is_ok()) {
        *end = group.ranks[rank].finish().map(|()| None);
    }
    for (rank, end) in ends.iter_mut().enumerate().filter(|(_, end)| end.is_ok()) {
        let compared = memory[rank].read(script.images[rank].before.len()).and_then(|found| {
            let wrong = script.first_wrong(rank, &found);
            let wrong = wrong.map(|(job, reason)| Wrong { job: Some(job), reason });
            Ok(match (wrong, &scene.tensors, registered) {
                (None, Some(tensors), Some(registered)) => {
                    let reason = tensors.verify(rank, registered)?;
                    reason.map(|reason| Wrong { job: None, reason })
                }
                (wrong, ..) => wrong,
            })
        });
        *end = compared;
    }
}

/// A scene's other calls, on the same ranks.
fn again(group: &mut Group, scene: &Scene) -> Vec<End> {
    let jobs = [scene.jobs[1].clone(), Vec::new()];
    let calls = Scene { jobs, tensors: None, ..scene.clone() };
    let script = &Script::new(calls.world, &calls.jobs[0], calls.seed + 1);
    let memory = match group.load(script) {
        Ok(memory) => memory,
        Err(error) => return (0..calls.world).map(|_| Err(error.clone())).collect(),
    };
    let stage = (script, memory.as_slice(), None);
    let mut ends = issue(group, &calls, stage, &Place::Nowhere);
    collect(group, &calls, stage, &mut ends);
    // No kernel may write to the memory any more when it goes.
    for rank in &group.ranks {
        let _ = rank.gpu.synchronize();
    }
    ends
}

/// That every rank's end is allowed; the names of their errors.
fn check_ends(
    scene: &Scene,
    jobs: &[Job],
    ends: &[End],
    stopped: Option<u32>,
) -> Result<Vec<&'static str>, String> {
    let mut names = Vec::new();
    for (rank, end) in ends.iter().enumerate() {
        match end {
            Ok(None) => {}
            Ok(Some(Wrong { job, reason })) => {
                let rest = job.map_or(&[][..], |job| &jobs[job..]);
                if !scene.class.is_promised(scene, rest) {
                    continue;
                }
                return Err(format!("wrong without an error: {reason}; {}", describe(ends)));
            }
            Err(error) => match name(error, scene.class, stopped) {
                Some(name) => names.push(name),
                None => return Err(format!("rank {rank}: {error}; {}", describe(ends))),
            },
        }
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// The name of an error that a rank may end with.
fn name(error: &Error, class: Class, stopped: Option<u32>) -> Option<&'static str> {
    match *error {
        Error::Timeout { .. } => Some("Timeout"),
        Error::Aborted { .. } => Some("Aborted"),
        Error::Stopped { .. } => Some("Stopped"),
        Error::Corrupt { .. } => Some("Corrupt"),
        Error::Mismatch { .. } => Some("Mismatch"),
        Error::PeerLost { .. } => (class == Class::ProcessDies).then_some("PeerLost"),
        // The stopped GPU's own ranks. Any other is a hang or an access that is not allowed.
        Error::Simulated { device, .. } => (Some(device) == stopped).then_some("device error"),
        _ => None,
    }
}

/// That the ranks' waits ended within the bound, in simulated time.
fn check_bound(scene: &Scene, played: &Played, place: &Place, took_ns: u64) -> Result<(), String> {
    let of_fault = |fault: &Fault| match *fault {
        Fault::Slow { lasts_ns, turn_ns, .. } => lasts_ns + turn_ns,
        Fault::Store { harm: Harm::Late(ns), .. } => ns,
        _ => 0,
    };
    let extra: u64 = match place {
        Place::Machine(faults) => faults.iter().map(of_fault).sum(),
        _ => 0,
    };
    let deadline = match scene.class {
        // The others are told.
        Class::ProcessDies | Class::Abort => TOLD_NS,
        _ => scene.config.deadline.as_nanos().min(DEADLINE.as_nanos()) as u64,
    };
    let bound = OVERSHOOT * (took_ns + deadline + extra);
    // The simulated clock says nothing about deadlines that are real time.
    if scene.kind != Kind::Scheduled && played.took_ns > bound {
        let took = played.took_ns;
        return Err(format!("took {took} ns, allowed are {bound}: {}", describe(&played.ends)));
    }
    Ok(())
}

fn describe(ends: &[End]) -> String {
    let text = |(rank, end): (usize, &End)| match end {
        Ok(None) => format!("rank {rank} is right"),
        Ok(Some(wrong)) => format!("rank {rank} is wrong: {}", wrong.reason),
        Err(error) => format!("rank {rank}: {error}"),
    };
    ends.iter().enumerate().map(text).collect::<Vec<_>>().join("; ")
}
