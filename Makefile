# The targets set up everything they need in .venv, from a bare Python >= 3.10.
PYTHON ?= python3

.PHONY: demo test experiments
demo: .venv/ready
	.venv/bin/python air.py --overwrite

test: .venv/ready
	.venv/bin/python -m pytest

# The paper's tables and figures on the demo; goes on where it stopped. Pictures need matplotlib, numbers do not.
experiments: .venv/ready
	-.venv/bin/python -m pip install --quiet --disable-pip-version-check matplotlib
	for name in table2 table7 table8 fig1 fig2 fig3 fig5 fig6 a6 open_questions; do \
	    .venv/bin/python experiments/$$name.py || exit 1; done

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
