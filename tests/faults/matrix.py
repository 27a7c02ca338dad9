"""The fault table: what can go wrong, and which tests show what happens then. Read by `make faults`.

A test is FILE::FUNCTION, or FILE::FUNCTION[BEGINNING for those of its cases whose name begins so.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MATRIX", "Row"]

LINES = "tests/commands/test_wrong_command_lines.py::test_a_wrong_command_line_is_refused_in_one_line[row-"
DATA = "tests/commands/test_wrong_data.py::"
FILES = f"{DATA}test_wrong_data_is_refused_in_one_line_before_a_model_is_loaded[row-"
GONE = f"{DATA}test_data_that_is_not_there_is_refused[row-"
ODD = f"{DATA}test_odd_texts_are_trained_on_and_counted"
SAVED = "tests/commands/test_eval.py::test_a_damaged_run_is_refused["
RESUME = "tests/commands/test_resume.py::"
STOP = "tests/commands/test_stop.py::"
SWEEP = "tests/commands/test_sweep.py::"
DISKS = "tests/faults/test_disks.py::"
ROWS = "tests/faults/test_rows.py::"
ADAPTER = "tests/nn/test_adapter.py::"
CONFIG = f"{ADAPTER}test_config_that_cannot_be_used_is_refused_at_once["
FILE = f"{ADAPTER}test_damaged_or_hostile_file_is_refused_before_the_model_is_touched["
COSTS = "tests/faults/test_costs.py::test_a_hostile_file_costs_next_to_nothing["
MODELS = "tests/test_models.py::"
DEAD_RANK = (
    "tests/commands/test_distributed.py::test_a_rank_that_dies_ends_all_at_once_and_another_number_of_them_goes_on"
)
FAILED_RANK = "tests/commands/test_distributed.py::test_a_rank_that_fails_says_why"
LIMITS = "tests/serving/test_limits.py::"


@dataclass(frozen=True)
class Row:
    """One fault. `instead` says why no test can show it, or not all of it."""

    number: int
    case: str
    tests: tuple[str, ...] = ()
    instead: str = ""


def _rows(*rows: tuple[object, ...]) -> tuple[Row, ...]:
    found = []
    for number, (case, *rest) in enumerate(rows, 1):
        tests = tuple(str(test) for test in rest if "::" in str(test))
        instead = " ".join(str(test) for test in rest if "::" not in str(test))
        found.append(Row(number, str(case), tests, instead))
    return tuple(found)


MATRIX = _rows(
    ("unknown key", f"{LINES}1-"),
    ("value of the wrong type", f"{LINES}2-"),
    ("value out of range", f"{LINES}3-", "tests/test_spec.py::test_a_value_out_of_range_is_refused_by_its_key"),
    ("unknown task, model, group", f"{LINES}4-"),
    ("_target_ typed, or in a run", f"{LINES}5-", f"{SAVED}target"),
    (
        "a run's config: YAML bomb, tag, self reference, binary, list, empty",
        *(f"{SAVED}{name}" for name in ("bomb", "broken_config", "itself", "tag", "binary", "a_list", "empty", "huge")),
        f"{COSTS}config",
    ),
    (
        "an environment value in a config",
        f"{SAVED}resolver",
        "tests/test_config.py::test_the_environment_is_not_read_into_a_config",
        f"{ROWS}test_no_file_of_a_run_holds_a_token",
    ),
    (
        "a run that points out, or asks for code",
        *(f"{SAVED}{name}" for name in ("a_link", "adapter_elsewhere", "results_elsewhere", "foreign_key", "code")),
        "tests/runs/test_directory.py::test_a_run_with_links_in_it_is_refused",
        f"{GONE}8-",
    ),
    (
        "keys that contradict each other",
        f"{LINES}9-",
        "tests/test_spec.py::test_keys_that_contradict_each_other_are_both_named",
    ),
    ("a run of a newer version", f"{SAVED}newer", f"{SAVED}no_json"),
    ("a data file missing, a folder, a pipe", f"{GONE}11-", f"{FILES}11-"),
    ("a column missing, in all rows or in one", f"{FILES}12-", f"{GONE}12-"),
    ("an empty file", f"{FILES}13-"),
    ("text that is null, a number, a list", f"{FILES}14-"),
    ("an empty text", ODD),
    ("a label that is null, NaN, of another type", f"{FILES}16-"),
    (
        "an unknown label",
        f"{GONE}17-",
        "tests/commands/test_eval.py::test_a_label_that_the_run_does_not_know_is_refused_with_its_line",
    ),
    ("labels as text and as numbers", f"{DATA}test_numbers_as_text_and_as_numbers_are_the_same_labels", f"{GONE}18-"),
    ("one class only", f"{FILES}19-", f"{DATA}test_a_split_of_one_class_is_scored_and_what_is_undefined_is_said"),
    ("a row of 10 MB", ODD),
    ("no UTF-8, UTF-16, NUL", f"{FILES}21-"),
    ("byte order mark, CRLF", f"{DATA}test_a_byte_order_mark_and_crlf_change_nothing"),
    ("broken, cut, deep JSON", f"{FILES}23-"),
    ("repeated and shared rows", f"{DATA}test_repeated_and_shared_rows_are_warned_about_with_their_number"),
    ("half a character, control characters", ODD),
    ("data changed before resuming", f"{RESUME}test_a_run_is_not_continued_on_other_data"),
    ("files of a model missing, offline", f"{LINES}27-", f"{GONE}27-", f"{MODELS}test_missing_files_are_named"),
    (
        "base weights cut, or of another index",
        f"{MODELS}test_truncated_weights_are_named",
        f"{MODELS}test_shards_load_and_a_missing_or_foreign_one_is_named",
    ),
    (
        "an architecture that does not fit the task",
        f"{MODELS}test_an_encoder_does_not_write",
        "tests/test_reader.py::test_an_encoder_is_refused_for_text_that_is_written",
        f"{MODELS}test_architecture_other_than_the_model_file_says_is_refused_unless_a_path_was_given",
    ),
    ("no target matched", f"{LINES}30-"),
    (
        "a tokenizer without pad token",
        f"{MODELS}test_a_decoder_without_pad_token_pads_with_its_end_mark_and_that_changes_nothing",
        f"{MODELS}test_a_decoder_with_neither_pad_token_nor_end_mark_is_refused",
    ),
    ("token ids beyond the vocabulary", f"{LINES}32-"),
    (
        "text beyond the context",
        ODD,
        "tests/test_experiment.py::test_texts_longer_than_the_model_can_read_are_cut_not_an_index_error",
        "tests/tasks/test_sequences.py::test_a_prompt_is_cut_in_its_cells_and_never_beyond_its_budget",
    ),
    ("another base than the adapter's", f"{SAVED}other_base"),
    (
        "kill -9, again and again",
        f"{RESUME}test_an_interrupted_training_is_bit_equal_to_an_uninterrupted_one",
        "tests/faults/test_chaos.py::test_a_training_killed_again_and_again_ends_as_one_left_alone",
        f"{SAVED}unfinished",
    ),
    ("kill -9 in a save", f"{DISKS}test_a_kill_while_a_checkpoint_is_written_is_as_if_it_had_not_been"),
    (
        "a damaged file of a checkpoint",
        f"{DISKS}test_a_training_with_a_damaged_checkpoint_goes_on_from_the_one_before",
        "tests/engine/test_checkpoint.py::test_damage_to_any_file_falls_back_to_the_one_before",
        "tests/engine/test_checkpoint.py::test_a_damaged_newest_one_makes_no_whole_one_go",
    ),
    ("a full disk", f"{DISKS}test_a_full_disk_is_told_and_after_room_is_made_the_end_is_the_same"),
    ("EFBIG, EIO", f"{DISKS}test_what_a_disk_refuses_is_told_and_later_the_end_is_the_same"),
    (
        "a read-only folder, a file in the way",
        f"{DISKS}test_a_read_only_folder_is_refused_and_nothing_is_left_in_it",
        f"{RESUME}test_a_file_in_the_way_of_the_run_folder_is_kept",
    ),
    (
        "two processes, one folder",
        f"{RESUME}test_a_folder_in_use_is_refused_and_left_alone",
        f"{ROWS}test_a_lock_dies_with_its_process",
    ),
    ("resuming with other settings", f"{RESUME}test_a_run_is_not_continued_with_another_configuration"),
    ("resuming a finished run", f"{RESUME}test_resuming_a_finished_run_changes_nothing_and_says_its_figures"),
    (
        "training into a used folder",
        "tests/commands/test_train.py::test_the_same_seed_gives_the_same_bytes_in_another_folder",
        "tests/commands/test_train.py::test_a_second_run_of_the_same_command_gets_a_folder_of_its_own",
    ),
    (
        "clocks and file times",
        f"{RESUME}test_clocks_and_file_times_decide_nothing",
        f"{DISKS}test_times_of_files_decide_nothing",
    ),
    (
        "SIGINT, SIGTERM",
        f"{RESUME}test_a_killed_training_resumes_and_an_interrupted_one_says_one_line",
        "tests/commands/test_signals_and_pipes.py::test_sigterm_ends_a_training_like_ctrl_c_and_it_can_be_continued",
        f"{STOP}test_a_signal_at_any_moment_keeps_the_step_and_the_end_is_the_same",
        f"{STOP}test_each_signal_has_its_exit_code",
        f"{STOP}test_a_second_signal_does_not_wait",
    ),
    (
        "no reader, no terminal, no HOME, LANG=C",
        "tests/commands/test_signals_and_pipes.py::test_a_training_goes_on_when_nobody_reads_its_lines",
        "tests/commands/test_signals_and_pipes.py::test_help_without_a_reader_ends_quietly",
        f"{ROWS}test_a_poor_environment_is_enough",
    ),
    ("too little memory", f"{DISKS}test_too_little_memory_is_told_with_what_needs_less", "of a GPU: GPU"),
    (
        "a loss that is no number",
        f"{DATA}test_a_training_that_diverges_stops_with_exit_code_1_and_saves_nothing",
        "tests/engine/test_train.py::test_a_loss_that_is_no_number_stops_before_the_weights_are_touched",
    ),
    ("overflow in fp16", "GPU"),
    (
        "batches that are not full",
        "tests/engine/test_train.py::test_accumulated_batches_equal_one_big_batch",
        "tests/test_experiment_text.py::test_four_accumulated_batches_are_one_big_batch",
    ),
    ("nothing to learn in a row", "tests/tasks/test_generation.py::test_a_row_that_cannot_be_used_is_named"),
    (
        "accumulation over a resumption",
        "tests/engine/test_train.py::test_a_resumed_training_equals_the_uninterrupted_one_to_the_last_bit",
        f"{RESUME}test_an_interrupted_training_is_bit_equal_to_an_uninterrupted_one",
    ),
    (
        "an adapter cut, empty, with a false header",
        f"{SAVED}cut_adapter",
        *(f"{FILE}{name}" for name in ("one byte short", "half", "empty", "trailing bytes", "8 EiB header")),
        f"{ADAPTER}test_header_that_does_not_add_up_is_refused",
    ),
    ("tensors missing", f"{SAVED}no_tensors", f"{FILE}missing", f"{FILE}none"),
    ("a tensor too many, a base tensor", f"{SAVED}base_tensor", f"{FILE}base tensor", f"{FILE}unknown tensor"),
    ("wrong rank, shape, dtype", f"{FILE}shape", f"{FILE}dtype", f"{CONFIG}rank differs", f"{CONFIG}r above layer"),
    (
        "r or alpha that is none",
        f"{SAVED}huge_rank",
        *(f"{CONFIG}{name}" for name in ("r ", "alpha ")),
        *(f"{FILE}{name}" for name in ("NaN", "Infinity", "overflow")),
        f"{COSTS}adapter-r",
    ),
    (
        "an expression for targets, or what matches nothing",
        f"{SAVED}expression",
        *(f"{CONFIG}{name}" for name in ("regex", "no match", "integer")),
        f"{COSTS}adapter-regex",
    ),
    (
        "pickles, links, pipes",
        f"{SAVED}pickle_weights",
        *(f"{FILE}{name}" for name in ("pickle", "link", "config link", "fifo")),
    ),
    ("an adapter's config that is no JSON object", *(f"{FILE}{name}" for name in ("not JSON", "list", "deep"))),
    ("bad JSON in a request", f"{LIMITS}test_a_bad_body_is_refused_and_does_no_harm"),
    (
        "bad adapter names in a request",
        f"{LIMITS}test_only_names_of_the_table_lead_anywhere",
        f"{LIMITS}test_only_names_of_the_table_lead_anywhere_in_an_address",
        f"{LIMITS}test_a_head_of_a_megabyte_is_refused",
        f"{LIMITS}test_an_endless_head_is_refused_while_an_answer_is_on_its_way",
        f"{LIMITS}test_endless_trailers_of_a_body_are_refused",
        f"{LIMITS}test_a_connection_on_which_hundreds_of_requests_wait_is_closed",
        "tests/serving/test_pool.py::test_links_in_a_folder_are_no_adapters",
    ),
    (
        "an adapter removed while it is loaded",
        f"{LIMITS}test_an_adapter_removed_while_it_is_loaded_harms_no_other",
        "tests/serving/test_pool.py::test_an_adapter_that_went_is_told_without_its_path",
        "tests/serving/test_pool.py::test_a_damaged_change_leaves_what_was_there",
    ),
    (
        "1000 requests",
        f"{LIMITS}test_a_thousand_requests_at_200_at_a_time_are_answered_as_single_ones",
        f"{LIMITS}test_too_many_waiting_texts_are_sent_away",
    ),
    (
        "slow clients, false lengths",
        f"{LIMITS}test_slow_clients_do_not_keep_others_waiting",
        f"{LIMITS}test_more_connections_than_allowed_are_sent_away",
        f"{LIMITS}test_a_length_that_is_too_large_or_none_is_refused_before_a_byte_is_read",
        f"{LIMITS}test_a_body_without_a_length_is_cut_off_where_it_is_too_large",
    ),
    (
        "huge texts and parameters in a request",
        f"{LIMITS}test_odd_texts_are_classified",
        f"{LIMITS}test_too_long_a_text_is_refused",
        f"{LIMITS}test_a_number_out_of_range_is_refused_by_its_name",
        f"{LIMITS}test_what_is_no_number_is_refused",
        f"{LIMITS}test_an_answer_that_takes_too_long_is_given_up",
    ),
    ("SIGTERM while serving", "tests/commands/test_serve.py::test_a_signal_ends_it_after_what_was_begun"),
    (
        "no token, a wrong one",
        f"{LIMITS}test_a_token_is_needed_wherever_anything_is_told_or_done",
        f"{LIMITS}test_a_token_comes_from_a_file_of_ones_own_or_the_environment",
        f"{LIMITS}test_other_sites_may_not_ask_by_the_users_browser",
    ),
    ("the address it listens on", f"{LIMITS}test_it_listens_to_this_machine_only_unless_asked_and_then_with_a_token"),
    (
        "a job of a sweep fails",
        f"{SWEEP}test_a_bad_rank_a_kill_and_lack_of_memory_cost_one_job_each",
        "tests/commands/test_train.py::test_a_sweep_goes_on_after_a_bad_job",
    ),
    (
        "a sweep is stopped",
        f"{SWEEP}test_a_sweep_that_is_stopped_saves_says_what_is_done_and_the_same_words_do_the_rest",
        "tests/commands/test_compare.py::test_a_comparison_that_is_stopped_stops_its_training_and_goes_on_later",
    ),
    ("a rank dies", DEAD_RANK, FAILED_RANK),
    ("resuming with another number of ranks", DEAD_RANK),
)  # fmt: skip
