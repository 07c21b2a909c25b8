# This is the language setting of the study of claims (config/claims.toml): the GPT of config/cpu.py after 0.8M tokens.
#   python claims.py gpt
include("cpu.py")
max_iters = 400
warmup_iters = max_iters // 8
min_lr = learning_rate / 10
eval_interval = max_iters
eval_iters = -1 # the whole of
test_fraction = 0.5 # the first half of the validation split; the other one is for the end
log_interval = 20
