//! Arguments that a call refuses, alone or because ranks disagree.

use peerlane::gpu::{DevicePtr, Stream};
use peerlane::{
    AllGather, AllReduce, Broadcast, Communicator, DType, Error, Gather, ReduceOp, ReduceScatter,
    Result, Wire,
};
use peerlane_tests::{Group, Job, Machine, Memory, Script, moves, reductions, small};

/// A group with a script that it has not run yet.
struct Scene {
    group: Group,
    script: Script,
    memory: Vec<Memory>,
}

impl Scene {
    fn new(world: u32) -> Scene {
        let group = Group::connect(&Machine::sim(world, 1), world, &small(world));
        let mut calls = reductions(50);
        calls.extend(moves(world, 100));
        let jobs: Vec<Job> = calls.into_iter().map(Job::plain).collect();
        let script = Script::new(world, &jobs, 1);
        let memory = group.load(&script).expect("there is memory");
        Scene { group, script, memory }
    }

    /// Makes a call on rank 0 that must be refused in words that hold all of `fragments`.
    fn refuse(
        &mut self,
        call: impl Fn(&mut Communicator, DevicePtr, Stream) -> Result<()>,
        fragments: &[&str],
    ) -> Error {
        let base = self.memory[0].base.offset(256);
        let rank = &mut self.group.ranks[0];
        let error = call(&mut rank.communicator, base, rank.stream).expect_err("it is refused");
        let text = error.to_string();
        for fragment in fragments {
            assert!(text.contains(fragment), "{text:?} does not say {fragment:?}");
        }
        error
    }

    /// No refused call has written anything, and right calls still work.
    fn works(mut self) {
        let found = self.group.collect(&self.memory, &self.script).expect("nothing has failed");
        let before: Vec<_> = self.script.images.iter().map(|image| image.before.clone()).collect();
        assert!(found == before, "a refused call has written");
        self.group.issue(&self.script, &self.memory).expect("the calls are right");
        let found = self.group.collect(&self.memory, &self.script).expect("all ranks called");
        self.script.verify(&found).expect("the results are right");
    }
}

fn sum(tensor: DevicePtr, count: usize) -> AllReduce {
    AllReduce::in_place(tensor, count, DType::F32)
}

fn scatter(src: DevicePtr, dst: DevicePtr, count: usize) -> ReduceScatter {
    let (dtype, op, wire) = (DType::F32, ReduceOp::Sum, Wire::Native);
    ReduceScatter { src, dst, count, dtype, op, wire, contribution: true }
}

/// Queues `call` on a communicator.
macro_rules! queue {
    ($method:ident, $call:expr) => {
        |communicator: &mut Communicator, at: DevicePtr, stream: Stream| {
            let call = $call(at);
            // SAFETY: the call is refused before any address is used.
            unsafe { communicator.$method(&call, stream) }
        }
    };
}

const NULL: DevicePtr = DevicePtr(0);

#[test]
fn null_tensors_are_refused() {
    let mut scene = Scene::new(2);
    let says = |op, argument| [op, argument, "expected a device address, got null"];
    scene.refuse(queue!(all_reduce, |_| sum(NULL, 4)), &says("all_reduce", "dst"));
    let no_source = |at| AllReduce { src: NULL, ..sum(at, 4) };
    scene.refuse(queue!(all_reduce, no_source), &says("all_reduce", "src"));
    scene.refuse(queue!(reduce_scatter, |at| scatter(NULL, at, 4)), &says("reduce_scatter", "src"));
    scene.refuse(queue!(reduce_scatter, |at| scatter(at, NULL, 4)), &says("reduce_scatter", "dst"));
    let gather_all = |src, dst| AllGather { src, dst, bytes: 3 };
    scene.refuse(queue!(all_gather, |at| gather_all(NULL, at)), &says("all_gather", "src"));
    scene.refuse(queue!(all_gather, |at| gather_all(at, NULL)), &says("all_gather", "dst"));
    let broadcast = |_| Broadcast::new(NULL, 3, 0);
    scene.refuse(queue!(broadcast, broadcast), &says("broadcast", "data"));
    let gather = |src, dst| Gather { src, dst, rows: 1, widths: &[3, 3], root: 0 };
    scene.refuse(queue!(gather, |at| gather(NULL, at)), &says("gather", "src"));
    scene.refuse(queue!(gather, |at| gather(at, NULL)), &says("gather", "dst"));
    scene.works();
}

#[test]
fn tensors_not_aligned_to_their_elements_are_refused() {
    let mut scene = Scene::new(2);
    let says = ["dst", "aligned to 4 bytes for f32", "got 0x"];
    scene.refuse(queue!(all_reduce, |at: DevicePtr| sum(at.offset(2), 4)), &says);
    let odd = |at: DevicePtr| AllReduce { src: at.offset(1), dtype: DType::Bf16, ..sum(at, 4) };
    scene.refuse(queue!(all_reduce, odd), &["src", "aligned to 2 bytes for bf16"]);
    let odd = |at: DevicePtr| scatter(at.offset(3), at, 4);
    scene.refuse(queue!(reduce_scatter, odd), &["src", "aligned to 4 bytes for f32"]);
    scene.works();
}

#[test]
fn wrong_widths_and_roots_are_refused() {
    let mut scene = Scene::new(3);
    let gather = |widths, root| move |at| Gather { src: at, dst: at, rows: 1, widths, root };
    let says = ["gather", "widths", "expected 3 widths, one a rank, got 2"];
    scene.refuse(queue!(gather, gather(&[1, 1], 0)), &says);
    let says = ["widths", "expected 3 widths, one a rank, got 4"];
    scene.refuse(queue!(gather, gather(&[1; 4], 0)), &says);
    let says = ["gather", "root", "expected a rank from 0 to 2, got 3"];
    scene.refuse(queue!(gather, gather(&[1; 3], 3)), &says);
    let broadcast = |at| Broadcast::new(at, 1, 9);
    let says = ["broadcast", "root", "expected a rank from 0 to 2, got 9"];
    scene.refuse(queue!(broadcast, broadcast), &says);
    scene.works();
}

#[test]
fn sizes_that_no_memory_has_are_refused() {
    let mut scene = Scene::new(2);
    let says = |op| [op, "at most 2^34 bytes"];
    scene.refuse(queue!(all_reduce, |at| sum(at, usize::MAX)), &says("all_reduce"));
    let huge = |at| scatter(at, at, 1 << 38);
    scene.refuse(queue!(reduce_scatter, huge), &says("reduce_scatter"));
    let huge = |at| AllGather { src: at, dst: at, bytes: 1 << 40 };
    scene.refuse(queue!(all_gather, huge), &says("all_gather"));
    let huge = |at| Broadcast::new(at, usize::MAX, 0);
    scene.refuse(queue!(broadcast, huge), &says("broadcast"));
    let huge = |at| Gather { src: at, dst: at, rows: 2, widths: &[usize::MAX, 2], root: 0 };
    scene.refuse(queue!(gather, huge), &says("gather"));
    scene.works();
}

#[test]
fn a_stream_of_another_gpu_is_refused() {
    let mut scene = Scene::new(2);
    let foreign = scene.group.ranks[1].stream;
    let call = |communicator: &mut Communicator, at, _| {
        // SAFETY: the call is refused before any address is used.
        unsafe { communicator.all_reduce(&sum(at, 4), foreign) }
    };
    let says = ["stream", "expected a stream of GPU 0, where rank 0 is", "got a stream of GPU 1"];
    scene.refuse(call, &says);
    let says = ["barrier", "stream", "got no stream"];
    scene.refuse(|communicator, _, _| communicator.barrier(Stream(12345)), &says);
    scene.works();
}

#[test]
fn ranks_that_disagree_are_told_what_both_bring_and_may_call_again() {
    let mut scene = Scene::new(2);
    let (first, second) = (scene.memory[0].base, scene.memory[1].base);
    let bytes: Vec<usize> = scene.script.images.iter().map(|i| i.before.len()).collect();
    let tensors = [first, second].map(|base| base.offset(256));
    let [zero, one] = &mut scene.group.ranks[..] else { panic!("two ranks") };
    // SAFETY: the images are larger than the tensors.
    unsafe { zero.communicator.all_reduce(&sum(tensors[0], 16), zero.stream) }
        .expect("it is first");
    let half = AllReduce { dtype: DType::F16, ..sum(tensors[1], 32) };
    let maximum = AllReduce { op: ReduceOp::Max, ..sum(tensors[1], 16) };
    for (wrong, fragments) in [
        (sum(tensors[1], 15), ["f32 sum of 64 bytes", "f32 sum of 60 bytes"]),
        (half, ["f32 sum of 64 bytes", "f16 sum of 64 bytes"]),
        (maximum, ["f32 sum of 64 bytes", "f32 max of 64 bytes"]),
    ] {
        // SAFETY: as above.
        let refused = unsafe { one.communicator.all_reduce(&wrong, one.stream) };
        let error = refused.expect_err("the ranks disagree");
        assert!(matches!(error, Error::Mismatch { rank: 1, peer: 0, .. }), "{error:?}");
        let text = error.to_string();
        assert!(fragments.iter().all(|fragment| text.contains(fragment)), "{text}");
    }
    let refused = one.communicator.barrier(one.stream).expect_err("the ranks disagree");
    assert!(refused.to_string().contains("rank 1 brings barrier"), "{refused}");
    one.gpu.stream_synchronize(one.stream).expect("it has only uploads to do");
    let found = scene.memory[1].read(bytes[1]).expect("it is idle");
    assert!(found == scene.script.images[1].before, "a refused call has written");
    // SAFETY: as above.
    unsafe { one.communicator.all_reduce(&sum(tensors[1], 16), one.stream) }.expect("it is right");
    one.finish().expect("both have called");
    zero.finish().expect("both have called");
    for (rank, memory) in scene.memory.iter().enumerate() {
        let (image, stream) = (&scene.script.images[rank].before, scene.group.ranks[rank].stream);
        memory.write(image, stream).expect("it fits");
    }
    scene.works();
}

#[test]
fn a_closed_communicator_refuses_every_call() {
    let mut scene = Scene::new(2);
    scene.group.ranks[0].communicator.close().expect("nothing has failed");
    let says = |op| [op, "the communicator of rank 0 is closed"];
    scene.refuse(queue!(all_reduce, |at| sum(at, 4)), &says("all_reduce"));
    scene.refuse(queue!(reduce_scatter, |at| scatter(at, at, 4)), &says("reduce_scatter"));
    let gather_all = |at| AllGather { src: at, dst: at, bytes: 3 };
    scene.refuse(queue!(all_gather, gather_all), &says("all_gather"));
    let broadcast = |at| Broadcast::new(at, 3, 0);
    scene.refuse(queue!(broadcast, broadcast), &says("broadcast"));
    let gather = |at| Gather { src: at, dst: at, rows: 1, widths: &[3, 3], root: 0 };
    scene.refuse(queue!(gather, gather), &says("gather"));
    let error = scene.refuse(|c, _, stream| c.barrier(stream), &says("barrier"));
    assert_eq!(error, Error::Closed { op: "barrier", rank: 0 });
    assert_eq!(scene.group.ranks[0].communicator.close(), Ok(()));
    assert!(scene.group.ranks[0].communicator.ordinals().is_err());
}
