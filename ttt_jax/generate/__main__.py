"""Talk to Moshi with files: what it says while it hears a recording.

    python -m ttt_jax.generate --checkpoint=DIR --mimi=DIR --input=user.wav --output=moshi.wav --text=moshi.txt

DIRs are what `python -m ttt_jax.convert` writes (`--checkpoint` may also be a run of train.py). `--mimi` may be left
out where its folder is called mimi and lies in Moshi's or beside it. The input may be any
wav, flac, ogg, opus or mp3: it is resampled to 24 kHz, two channels are averaged (or one taken, `--channel`), and its
last frame of 80 ms is filled up with silence. The output has exactly as many frames as the input, of 1920 samples each
at 24 kHz, 16 bit: `.wav` (RF64 above 4 GB), `.flac` or `.w64`. Memory does not grow with the length, neither does the
time that a frame takes.

Side by side the two are a recording of the conversation: frame i of the output is what Moshi says while the user says
frame i of the input. (Live it can be heard one frame after that, as soon as frame i is over and has been computed.
Models of more than one frame of delay, which Kyutai's do not have, are late by the rest.)

`--text` gets the words, `--words` a JSON of them with their times in the input (and the silence before it), in
moshi-finetune's layout: `ttt_jax.data.prepare` reads it beside the sound of a whole run.

`--save_state=DIR` keeps the whole conversation as it is at the end, `--load_state=DIR` goes on with it. With
`--frames=N`, and in the next run `--load_state=DIR --start_frame=N`, one recording goes through in parts, and the parts
are what one run would have given, sample by sample (same flags, same machine); a word that the cut falls into is
written as two.

While it runs its files are called NAME.partial. They get their names at the end, also after Ctrl-C or SIGTERM, which
end the conversation with the present frame. An error leaves no files, a kill leaves NAME.partial.
"""

import pathlib
import sys
from typing import Any

from absl import app, flags

from ttt_jax import programs

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Moshi: a converted checkpoint or a run of train.py.", required=True
)
MIMI = flags.DEFINE_string(
    "mimi", None, "Mimi: a converted checkpoint; by default the folder mimi in or beside Moshi's."
)
INPUT = flags.DEFINE_string("input", None, "What the user says, a sound file.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "What Moshi says: .wav, .flac or .w64; not for text models.")
TEXT = flags.DEFINE_string("text", None, "Its words as plain text.")
WORDS = flags.DEFINE_string("words", None, "Its words and their times in seconds as JSON.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Sentencepiece model of the text; by default the checkpoint's.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Of the sound's tokens; 0 is greedy.", lower_bound=0.0)
TOP_K = flags.DEFINE_integer("top_k", 250, "Of them, the likeliest ones to draw from; 0 is all.", lower_bound=0)
TEMPERATURE_TEXT = flags.DEFINE_float("temperature_text", 0.7, "Of the text tokens; 0 is greedy.", lower_bound=0.0)
TOP_K_TEXT = flags.DEFINE_integer("top_k_text", 25, "Of them, the likeliest to draw from; 0 is all.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling; a conversation that goes on keeps its own.", lower_bound=0)
CHANNEL = flags.DEFINE_enum("channel", "mix", ["mix", "left", "right"], "What to take of a stereo input.")
START_FRAME = flags.DEFINE_integer("start_frame", 0, "Frames of the input to leave out.", lower_bound=0)
FRAMES = flags.DEFINE_integer("frames", None, "The most frames to take.", lower_bound=1)
SILENCE_BEFORE = flags.DEFINE_float("silence_before", 0.0, "Seconds of silence before the input.", lower_bound=0.0)
SILENCE_AFTER = flags.DEFINE_float("silence_after", 0.0, "Seconds of silence behind the input.", lower_bound=0.0)
TTT = flags.DEFINE_enum("ttt", "auto", ["auto", "on", "off"], "on demands TTT layers, off switches them off.")
CONDITION = flags.DEFINE_multi_string("condition", [], "NAME=VALUE, for models such as Hibiki; may be repeated.")
SAVE_STATE = flags.DEFINE_string("save_state", None, "Directory for the state at the end, which must not exist yet.")
LOAD_STATE = flags.DEFINE_string("load_state", None, "Directory of the state to go on with.")


def main() -> None:
    """Run the program."""
    conditions = {name: value for name, _, value in (text.partition("=") for text in CONDITION.value)}
    if any(not name or not value for name, value in conditions.items()):
        raise app.UsageError(f"--condition: expected NAME=VALUE, got {CONDITION.value}")
    # Imported late so that `--help` and wrong flags answer at once.
    from ttt_jax.data.audio import BadRecordingError
    from ttt_jax.generate import program

    files = (CHECKPOINT, MIMI, INPUT, OUTPUT, TEXT, WORDS, TOKENIZER, SAVE_STATE, LOAD_STATE)
    plain = (SEED, CHANNEL, START_FRAME, FRAMES, SILENCE_BEFORE, SILENCE_AFTER, TTT)
    values: dict[str, Any] = {flag.name: flag.value for flag in plain}
    values |= {flag.name: None if flag.value is None else pathlib.Path(flag.value) for flag in files}
    sampling = program.Sampling(TEMPERATURE.value, TOP_K.value, TEMPERATURE_TEXT.value, TOP_K_TEXT.value)
    try:
        report = program.run(program.Options(**values, sampling=sampling, conditions=conditions))
    except BadRecordingError as error:
        raise ValueError(f"--input: {INPUT.value}: {error}") from error
    print(report, file=sys.stderr)
    if report.stopped or report.frames == FRAMES.value:
        _tell_how_to_go_on(report.first_frame + report.frames)


def _tell_how_to_go_on(frame: int) -> None:
    way = f"--load_state={SAVE_STATE.value} --start_frame={frame}" if SAVE_STATE.value else "--save_state next time"
    print(f"stopped before frame {frame} of the input; to go on: {way}", file=sys.stderr)


if __name__ == "__main__":
    programs.run(main)
