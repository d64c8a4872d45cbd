//! Which GPU a communicator is on, from what the caller calls it.
//!
//! Invariant: one simulated machine for each number of GPUs in a process, as long as a communicator
//! or an array in its memory is alive; ranks that name the same machine can reach each other.

use crate::error;
use crate::options::dtype_name;
use crate::tensor::Tensor;
use peerlane::gpu::{Backend, DevicePtr, GpuRef, Stream, cuda, sim};
use peerlane::{DType, Error};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt, PyString};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A simulated machine.
pub(crate) struct Machine {
    gpus: Vec<GpuRef>,
    /// Memory of arrays that are gone, by GPU. Kernels that use it may still be queued.
    retired: Mutex<Vec<(u32, DevicePtr)>>,
}

impl Machine {
    /// The machine of `count` GPUs of this process.
    fn of(count: u32) -> Arc<Machine> {
        static MACHINES: Mutex<Option<HashMap<u32, Weak<Machine>>>> = Mutex::new(None);
        let mut guard = MACHINES.lock().unwrap_or_else(PoisonError::into_inner);
        let machines = guard.get_or_insert_default();
        if let Some(machine) = machines.get(&count).and_then(Weak::upgrade) {
            return machine;
        }
        let config = sim::Config { devices: count, autonomous: true, ..Default::default() };
        let gpus = sim::devices(&config);
        let machine = Arc::new(Machine { gpus, retired: Mutex::default() });
        machines.insert(count, Arc::downgrade(&machine));
        machine
    }

    /// Takes memory that no array uses any more.
    pub(crate) fn retire(&self, ordinal: u32, memory: DevicePtr) {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).push((ordinal, memory));
    }

    /// Frees the retired memory of one GPU, if nothing is queued there.
    pub(crate) fn sweep(&self, ordinal: u32) {
        let gpu = &self.gpus[ordinal as usize];
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        let none = !retired.iter().any(|(owner, _)| *owner == ordinal);
        // The default stream is the only one that Python can queue simulated work on; what runs
        // beside it has its tensors referred to until it is done.
        if none || !gpu.stream_query(Stream::default()).unwrap_or(false) {
            return;
        }
        for (_, memory) in retired.extract_if(.., |(owner, _)| *owner == ordinal) {
            // SAFETY: its array is gone, nothing is queued, and peers touch mailboxes only. A
            // failure leaves the memory to the machine, which frees everything in the end.
            let _ = unsafe { gpu.free(memory) };
        }
    }
}

/// A GPU that the caller named.
#[derive(Clone)]
pub(crate) struct Device {
    pub(crate) gpu: GpuRef,
    /// What the caller would call it.
    pub(crate) name: String,
    /// The machine of a simulated GPU.
    pub(crate) machine: Option<Arc<Machine>>,
}

/// What the caller asked for.
enum Wanted {
    Real(u32),
    Simulated { ordinal: u32, count: u32 },
}

impl Wanted {
    fn parse(text: &str) -> Option<Wanted> {
        if let Some(ordinal) = text.strip_prefix("cuda:") {
            return ordinal.parse().ok().map(Wanted::Real);
        }
        let (ordinal, count) = text.strip_prefix("sim:")?.split_once('/')?;
        let (ordinal, count) = (ordinal.parse().ok()?, count.parse().ok()?);
        let valid = (1..=16).contains(&count) && ordinal < count;
        valid.then_some(Wanted::Simulated { ordinal, count })
    }
}

impl Device {
    /// Finds the GPU that `named` means: an index, a string, or a torch.device.
    pub(crate) fn open(call: &str, argument: &str, named: &Bound<'_, PyAny>) -> PyResult<Device> {
        const EXPECTED: &str =
            "the index of a GPU, 'cuda:0', a torch.device with an index, or 'sim:0/8'";
        let py = named.py();
        let is_device = || error::kind(named) == "torch.device";
        let wanted = if named.is_instance_of::<PyBool>() {
            None
        } else if named.is_instance_of::<PyInt>() {
            named.extract().ok().map(Wanted::Real)
        } else if named.is_instance_of::<PyString>() || is_device() {
            Wanted::parse(&named.str()?.to_string())
        } else {
            return Err(error::wrong_type(call, argument, EXPECTED, error::kind(named)));
        };
        match wanted {
            None => Err(error::value(call, argument, EXPECTED, error::shown(named))),
            Some(Wanted::Simulated { ordinal, count }) => {
                let machine = Machine::of(count);
                let gpu = machine.gpus[ordinal as usize].clone();
                Ok(Device { gpu, name: format!("sim:{ordinal}/{count}"), machine: Some(machine) })
            }
            Some(Wanted::Real(ordinal)) => {
                let gpu = py.detach(|| cuda::device(ordinal)).map_err(|error| match error {
                    Error::InvalidArgument { expected, got, .. } => {
                        error::value(call, argument, expected, got)
                    }
                    other => error::raise(py, other),
                })?;
                Ok(Device { gpu, name: format!("cuda:{ordinal}"), machine: None })
            }
        }
    }

    /// The GPUs of a list, all real or all of one simulated machine: an index means something only
    /// there.
    pub(crate) fn open_all(call: &str, list: &Bound<'_, PyAny>) -> PyResult<Vec<Device>> {
        let wrong = || error::wrong_type(call, "devices", "a list of GPUs", error::kind(list));
        if list.is_instance_of::<PyString>() {
            return Err(wrong());
        }
        let each = list.try_iter().map_err(|_| wrong())?;
        let devices: Vec<_> =
            each.map(|one| Device::open(call, "devices", &one?)).collect::<PyResult<_>>()?;
        let machine = |device: &Device| device.machine.as_ref().map(Arc::as_ptr);
        match devices.iter().find(|device| machine(device) != machine(&devices[0])) {
            None => Ok(devices),
            Some(other) => {
                let expected = format!("GPUs of one machine, like {}", devices[0].name);
                Err(error::value(call, "devices", expected, &other.name))
            }
        }
    }

    /// Whether the GPU is simulated.
    pub(crate) fn simulated(&self) -> bool {
        self.gpu.backend() == Backend::Sim
    }
}

/// An argument of a call on a GPU: what messages about it name, and what it must satisfy.
pub(crate) struct Place<'a> {
    pub(crate) call: &'static str,
    pub(crate) argument: &'static str,
    gpu: &'a GpuRef,
    pub(crate) device: &'a str,
    ordinal: u32,
    simulated: bool,
}

impl<'a> Place<'a> {
    #[inline]
    pub(crate) fn new(
        call: &'static str,
        argument: &'static str,
        device: &'a Device,
        ordinal: u32,
    ) -> Place<'a> {
        let simulated = device.machine.is_some();
        Place { call, argument, gpu: &device.gpu, device: &device.name, ordinal, simulated }
    }

    #[inline]
    pub(crate) fn simulated(&self) -> bool {
        self.simulated
    }

    /// The index of a real GPU.
    #[inline]
    pub(crate) fn real_ordinal(&self) -> Option<u32> {
        (!self.simulated).then_some(self.ordinal)
    }

    #[inline]
    pub(crate) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// The element type that a reduction works with: the object's own, or for two bytes that the
    /// object cannot name, what the caller declares them to be.
    #[inline]
    pub(crate) fn element(
        &self,
        object: &Bound<'_, PyAny>,
        own: Option<DType>,
        declared: Option<DType>,
    ) -> PyResult<DType> {
        match (own, declared) {
            (Some(own), None) => Ok(own),
            (Some(own), Some(declared)) if own == declared => Ok(own),
            _ => self.declared(object, own, declared),
        }
    }

    #[cold]
    fn declared(
        &self,
        object: &Bound<'_, PyAny>,
        own: Option<DType>,
        declared: Option<DType>,
    ) -> PyResult<DType> {
        let dtype = object.getattr_opt("dtype")?;
        let got = dtype.map_or_else(|| error::kind(object), |dtype| dtype.to_string());
        let storage = matches!(got.as_str(), "uint16" | "torch.uint16" | "|V2");
        if own.is_none() && storage && declared == Some(DType::Bf16) {
            return Ok(DType::Bf16);
        }
        let expected = match declared {
            Some(declared) => dtype_name(declared),
            None => "float32, float16 or bfloat16",
        };
        Err(error::wrong_type(self.call, self.argument, expected, got))
    }

    /// That the whole tensor lies in this GPU's memory.
    pub(crate) fn check_owner(&self, object: &Bound<'_, PyAny>, tensor: &Tensor) -> PyResult<()> {
        if tensor.bytes() == 0 {
            return Ok(());
        }
        let last = tensor.at().offset(tensor.bytes() - 1);
        let owners = [self.gpu.owner_of(tensor.at()), self.gpu.owner_of(last)];
        if owners == [Some(self.ordinal); 2] {
            return Ok(());
        }
        let expected = format!("memory of {}", self.device);
        Err(match owners {
            [None, _] => {
                let got = format!("{} in host memory", error::kind(object));
                error::wrong_type(self.call, self.argument, expected, got)
            }
            [Some(owner), None] => self.wrong(expected, &format!("memory that GPU {owner} lacks")),
            [Some(owner), _] => self.wrong(expected, &format!("memory of GPU {owner}")),
        })
    }

    #[cold]
    pub(crate) fn not_contiguous(&self) -> PyErr {
        self.wrong("a contiguous tensor".into(), "one with gaps or in another order")
    }

    /// A `ValueError` about this argument.
    #[cold]
    pub(crate) fn wrong(&self, expected: String, got: &str) -> PyErr {
        error::value(self.call, self.argument, expected, got)
    }
}
