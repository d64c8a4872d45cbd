//! The conformance suite: what must hold on simulated and on real GPUs alike.
//!
//! [`for_each_test!`](crate::for_each_test) is the one list of its tests; `tests/conformance_sim.rs`
//! and `tests/conformance_cuda.rs` run every one of them.

pub mod lifetimes;
pub mod movement;
pub mod reductions;
pub mod sequences;

/// Calls `$callback!` with the path of every test of the suite.
#[macro_export]
macro_rules! for_each_test {
    ($callback:ident) => {
        $callback! {
            reductions::all_reduce_is_exact_for_every_type_operator_and_algorithm;
            reductions::reduce_scatter_is_exact_for_every_type_and_operator;
            reductions::reductions_are_exact_around_every_border;
            reductions::reductions_take_any_alignment;
            reductions::reductions_may_happen_in_place;
            reductions::ranks_without_contribution_receive_and_do_not_count;
            reductions::payload_that_looks_free_is_reduced;
            movement::every_rank_can_be_the_root;
            movement::movements_are_exact_around_every_border;
            movement::movements_take_any_alignment;
            movement::gathers_join_any_widths;
            movement::ranks_outside_a_gather_need_not_call;
            movement::payload_that_looks_free_arrives;
            sequences::calls_of_all_kinds_follow_each_other_without_waiting;
            sequences::any_rank_may_come_late;
            sequences::replayed_graphs_see_new_inputs;
            sequences::graphs_and_plain_calls_alternate;
            sequences::counters_wrap;
            sequences::calls_may_change_streams;
            sequences::a_rerun_gives_the_same_bits;
            lifetimes::two_communicators_share_gpus;
            lifetimes::all_ranks_fit_on_one_gpu;
            lifetimes::a_barrier_holds_until_the_last_rank;
            lifetimes::communicators_end_in_any_order;
            lifetimes::a_closed_group_makes_room_for_another;
            lifetimes::mailboxes_grow_and_shrink_between_calls;
            lifetimes::groups_recover_and_their_graphs_too;
            lifetimes::groups_shrink;
        }
    };
}

/// World sizes that every collective must work for.
pub const WORLDS: [u32; 6] = [1, 2, 3, 5, 8, 16];
