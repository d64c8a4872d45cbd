//! The kernels' symbols in the PTX. No logic: each entry hands its parameter to its algorithm.

use crate::abi::Args;
use crate::element::{Bf16, F16, F32, F32AsBf16};
use crate::kernels::*;
use crate::pipe::{Full, Packet};
use crate::ptx::{Parameters, PtxLane};
use core::arch::asm;

macro_rules! entries {
    ($($variant:ident $symbol:literal $body:ident::<$($parameter:ident),*> $barriers:literal;)*) => {$(
        const _: () = {
            #[derive(Clone, Copy)]
            struct Parameter;

            impl Parameters for Parameter {
                #[cfg_attr(target_arch = "nvptx64", inline(always))]
                fn load_u64(offset: u64) -> u64 {
                    let value: u64;
                    // SAFETY: reads the parameter bank within the entry's parameter, which
                    // outlives the kernel and never changes.
                    unsafe {
                        asm!(
                            concat!("{{ .reg .b64 at; mov.b64 at, ", $symbol, "_param_0;"),
                            " add.s64 at, at, {1}; ld.param.u64 {0}, [at]; }}",
                            out(reg64) value, in(reg64) offset,
                            options(pure, nomem, nostack, preserves_flags)
                        )
                    };
                    value
                }
            }

            /// # Safety
            /// The host launches it with arguments as `abi::Args` describes them.
            #[unsafe(export_name = $symbol)]
            unsafe extern "ptx-kernel" fn entry(args: Args) {
                // SAFETY: this is the entry that `Parameter` names; the host vouches for the rest.
                unsafe { $body::<PtxLane<Parameter>, $($parameter),*>(PtxLane::current(), &args) }
            }
        };
    )*};
}
crate::for_each_kernel!(entries);
