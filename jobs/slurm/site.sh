# This cluster and this experiment: the one place to edit. The templates of this folder read it, and every cell runs it
# before it starts. A copy serves as well: FINEMASK_SITE=my-site.sh bash jobs/slurm/chain.sbatch

# The search: a rank on each GPU of these nodes.
NODES=2
GPUS_PER_NODE=8
SEARCH_OPTIONS=(--gres=gpu:"$GPUS_PER_NODE" --cpus-per-task=8 --time=24:00:00)
SEARCH=(--data wikitext-103 --save_every 500) # options of launcher/tamt.py
RUN=runs/tamt-mlm                             # where its mask goes, and below it the cells
MOST_RESTARTS=20                              # so often a search that its time limit ended goes on

# The cells: a fine-tuning each, on one GPU, as options of sbatch without the dashes (exclusive= for one without a value).
CELL_OPTIONS=(gres=gpu:1 cpus-per-task=8 time=08:00:00)
CELLS_AT_A_TIME=16
SWEEP=(--data glue_data --seeds 1 2 3) # options of launcher/dispatch.py

# Every job, each option one word, as (--partition=gpu --account=me --exclusive); and the small one that only submits the
# cells.
SITE_OPTIONS=()
SMALL_OPTIONS=(--ntasks=1 --cpus-per-task=1 --time=00:30:00)

# What a shell needs before Python starts: the lines of your site in place of these.
# module load cuda
[ ! -e .venv/bin/activate ] || . .venv/bin/activate
