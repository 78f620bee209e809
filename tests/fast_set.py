"""The fast tests, ``pytest -m fast``: files that cover the core in under a minute on two cores, but for slow cases.

A file belongs here if all it takes is a few seconds and a change to the core may break it. Durations are those that
``pytest --durations=0`` prints; a single case above about half a second belongs into :data:`NOT_FAST`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

FAST = frozenset(
    {
        # selection, and what it is made of
        "test_alignment",
        "test_backends",
        "test_buffers",
        "test_calibration",
        "test_draw_partners",
        "test_estimators",
        "test_gradmix",
        "test_graphs",
        "test_head",
        "test_head_values",
        "test_heads",
        "test_marked_rows",
        "test_masks_by_task",
        "test_mixed_alignment",
        "test_mixing",
        "test_mixing_stage",
        "test_model_buffers",
        "test_promises",
        "test_selection",
        "test_sources",
        # gradients of networks
        "test_counter_random",
        "test_gradient_conversions",
        "test_gradient_rule_recipe",
        "test_gradient_rules",
        "test_gradient_shared_parameters",
        "test_gradient_targets",
        # training
        "test_benchmarks",
        "test_config",
        "test_datasets",
        "test_methods",
        "test_metrics",
        "test_settings",
        "test_streams",
        "test_tabular_data",
        # the project
        "test_docs",
        "test_doctor",
        "test_english",
        "test_fast_set",
        "test_kinds",
        "test_moved_names",
        "test_packaging",
        "test_pages",
        "test_project_files",
        "test_public_api",
        "test_ratchet",
        "test_readme",
    }
)
"""Names of the files, without ``.py``."""

NOT_FAST = frozenset(
    {
        "test_alignment::test_a_class_table_of_mixed_inputs_is_unbiased_over_its_random_pairs",
        "test_alignment::test_estimator_mixed_is_exact_for_the_last_layer",
        "test_alignment::test_reference_gradient",
        "test_backends::test_python_m_pytest_meets_the_installed_package",
        "test_backends::test_select_pairs_chooses_the_same_by_every_backend",
        "test_benchmarks::test_every_benchmark_is_complete",
        "test_benchmarks::test_normalisation_by_unknown_constants_is_refused",
        "test_benchmarks::test_split_digits",
        "test_buffers::test_every_row_is_held_equally_often",
        "test_buffers::test_same_rows_in_same_order_whatever_the_split",
        "test_counter_random::test_inner_products_are_kept_in_the_mean",
        "test_datasets::test_digits",
        "test_draw_partners::test_any_rows",
        "test_draw_partners::test_every_block_of_the_kernel_gives_the_same",
        "test_draw_partners::test_every_body_gives_the_same_integers",
        "test_draw_partners::test_registration",
        "test_draw_partners::test_strided_matrices_give_the_same",
        "test_draw_partners::test_torch_compile_passes_through_without_a_graph_break",
        "test_estimators::test_a_network_without_rules_row_by_row",
        "test_estimators::test_a_pass_takes_as_many_rows_as_memory_allows",
        "test_estimators::test_jvp_is_exact",
        "test_estimators::test_sketched_inner_products_are_within_their_standard_errors",
        "test_estimators::test_without_a_sketch_it_is_the_mixture_of_the_gradients",
        "test_gradient_conversions::test_without_a_rule_it_is_refused_by_name_or_exact",
        "test_gradient_rules::test_derivatives_along_a_direction_and_norms",
        "test_gradient_rules::test_equals_the_loop_with_a_layer_below",
        "test_gradient_rules::test_in_float32",
        "test_gradient_rules::test_under_autocast_to_bfloat16",
        "test_gradient_targets::test_inputs_of_several_tensors",
        "test_gradient_targets::test_targets_are_whatever_the_loss_takes",
        "test_gradmix::test_over_all_parameters_those_that_are_frozen_count",
        "test_gradmix::test_what_is_kept_of_another_model_is_made_anew",
        "test_graphs::test_replays_choose_what_calls_choose",
        "test_head_values::test_outputs_with_marked_samples_are_those_of_a_pass",
        "test_head_values::test_where_nothing_is_looked_at_heads_are_served_alike",
        "test_head_values::test_where_nothing_is_looked_at_the_decisions_are_the_same",
        "test_methods::test_every_method_learns",
        "test_methods::test_manifold_mixup_in_a_compiled_model_and_under_autocast",
        "test_methods::test_manifold_mixup_in_a_resnet_with_lam_1_is_the_plain_pass",
        "test_methods::test_manifold_mixup_mixes_at_one_layer",
        "test_methods::test_replay_keeps_what_finetuning_forgets",
        "test_metrics::test_interval_against_the_printed_table",
        "test_mixed_alignment::test_any_rows",
        "test_mixed_alignment::test_equals_the_reference_in_float64",
        "test_mixed_alignment::test_low_precision_against_float64_of_the_same_numbers",
        "test_mixed_alignment::test_registration",
        "test_mixed_alignment::test_torch_compile_passes_through_without_a_graph_break",
        "test_mixing::test_draws_follow_beta",
        "test_mixing::test_the_same_seed_gives_the_same_draws",
        "test_mixing_stage::test_steps_on_token_ids_learn",
        "test_mixing_stage::test_under_autocast_and_compiled",
        "test_packaging::test_a_bare_checkout_imports_without_its_kernels",
        "test_packaging::test_doctests",
        "test_selection::test_any_rows",
        "test_selection::test_uniform_draws_every_helpful_partner_equally_often",
        "test_sources::test_every_source_gives_the_same_gradients",
    }
)
"""Cases of these files that take long, as ``file::function``."""


def is_fast(file: str, function: str) -> bool:
    return file in FAST and f"{file}::{function}" not in NOT_FAST


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only fast tests are asked for, the other files are not read: collecting them all takes long."""
    only_fast = config.option.markexpr.strip() == "fast"
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if only_fast and is_test and collection_path.stem not in FAST else None


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        function = getattr(item, "originalname", item.name)
        if is_fast(item.path.stem, function) and not any(item.iter_markers("slow")):
            item.add_marker("fast")
