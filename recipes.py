"""
recipes.py: the values of a run that belong together, side by side.

`--recipe demo` (the default) or `--recipe paper` chooses a column; any value can still be given by
its flag. Paths of models and data are not part of a recipe.

demo: a 135M LLM and Whisper tiny.en on a laptop, clips of at most 6 s, a quarter of an hour.
paper: Llama-3.1-8B-Instruct and Whisper-large-v3 on 8 GPUs. Where the paper is silent, the authors'
released configuration.
"""

GENERATE_DATA = dict(
    # What stands before the question. The demo's small LLM needs worked examples (LOG.md).
    system=dict(demo="demo/context.json", paper="Focus on the audio clips and instructions."),
    # One instruction a line, a file per domain. The paper's pool can be read
    # back from its rows: `python corpora.py instructions AQA5M_FOLDER --out instructions`.
    instructions=dict(demo="demo/instructions", paper="instructions"),
    temperature=dict(demo=0.05, paper=0.05),
    top_p=dict(demo=1.0, paper=1.0),
    # The window of Whisper, for the transcript. The demo's clips last 1 to 6 s.
    audio_seconds=dict(demo=6, paper=30),
    # Longer answers are cut here, and left out unless --keep_truncated.
    max_new_tokens=dict(demo=36, paper=300),
    batch_size=dict(demo=64, paper=256),
    # At a block's end lanes run empty: 4096 rows keep 256 lanes 84 % full, 1024 only 67 % (LOG.md).
    block=dict(demo=128, paper=4096),
)

TRAIN = dict(
    # The adapter: 7.3 M trained parameters, 131.5 M in the paper.
    n_layers=dict(demo=2, paper=6),
    n_queries=dict(demo=16, paper=64),
    dropout=dict(demo=0.0, paper=0.1),
    audio_seconds=dict(demo=6, paper=30),
    # 1: a clip of 2 s is heard in a window of 2 s. The released model pads all clips to 30 s.
    fit_window=dict(demo=0, paper=0),
    # Clips to fit the initial weights to: half the steps until it hears (LOG.md). Not in the paper.
    standardize=dict(demo=256, paper=0),
    # Optimisation. The batch is small in the demo, because it makes few steps.
    # Twice the demo's rate loses what is hard to hear (LOG.md).
    lr=dict(demo=5e-4, paper=1e-4),
    warmup=dict(demo=20, paper=2000),
    epochs=dict(demo=2, paper=5),
    global_batch=dict(demo=8, paper=96),
    micro_batch=dict(demo=4, paper=12),
    # 12 rows of 512 tokens: what an 80 GB card holds beside the models (docs/scale.md).
    max_tokens_per_pass=dict(demo=6144, paper=6144),
    weight_decay=dict(demo=0.01, paper=0.01),
    beta2=dict(demo=0.98, paper=0.98),
    clip=dict(demo=1.0, paper=1.0),
    # Rows sorted by length among so many batches. 1 keeps every step a fair mix of rows.
    length_pool=dict(demo=1, paper=32),
    # Tokens. Longer rows are left out and counted; the authors cut them.
    max_answer_tokens=dict(demo=40, paper=300),
    max_prompt=dict(demo=1000, paper=1000),
    # The run
    eval_every=dict(demo=60, paper=1000),
    save_every=dict(demo=60, paper=1000),
)
