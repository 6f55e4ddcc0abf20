"""Examples of each command, shown below its help."""

from __future__ import annotations

EXAMPLES = {
    "init": """examples:
  largescale init data/photos > photos.yaml
  largescale init data/photos --hours 0.2 --gpus 0 > photos.yaml
  largescale init data/photos --hours 24 --gpu a100-80 --gpus 8 > photos.yaml""",
    "pretrain": """examples:
  largescale pretrain configs/demo.yaml
  largescale pretrain configs/demo.yaml optim.lr=0.001 run.seed=1 --print
  torchrun --standalone --nproc-per-node=2 -m largescale pretrain configs/demo.yaml parallel.strategy=fsdp""",
    "distill": """examples:
  largescale distill teacher.safetensors configs/small/distillation.yaml
  largescale distill teacher.safetensors configs/small/distillation.yaml name=quarter model.width=16
  largescale distill teacher.safetensors configs/small/distillation.yaml init_from=runs/pretrained
  largescale distill runs/student configs/small/distillation.yaml name=smaller model.width=8""",
    "config": """examples:
  largescale config
  largescale config optim
  largescale config method.queue
  largescale config optim.lr configs/demo.yaml optim.lr=0.3
  largescale config configs/demo.yaml""",
    "evaluate": """examples:
  largescale evaluate knn runs/demo
  largescale evaluate knn,linear runs/demo evaluate.linear_epochs=50
  largescale evaluate knn runs/a runs/b runs/b/checkpoints/step-00001000 data.eval_shards=data/other-test
  largescale evaluate knn resnet50.pth evaluate.train_shards=data/train data.eval_shards=data/test
  torchrun --standalone --nproc-per-node=2 -m largescale evaluate knn runs/demo""",
    "finetune": """examples:
  largescale finetune runs/demo teacher.safetensors evaluate.low_shot_finetune_share=0.1
  largescale finetune runs/demo teacher.safetensors evaluate.low_shot_finetune_head_layers=1
  largescale finetune runs/demo all-labels.safetensors --protocol finetune evaluate.finetune_epochs=20
  torchrun --standalone --nproc-per-node=2 -m largescale finetune runs/demo teacher.safetensors""",
    "features": """examples:
  largescale features runs/demo data/shards/fashion-mnist-test features/demo-test
  largescale features runs/demo data/shards/photos features/photos --assign --thumbnails 64
  largescale features runs/demo data/shards/photos features/small --dim 128
  torchrun --standalone --nproc-per-node=8 -m largescale features runs/demo data/shards/photos features/photos""",
    "assign": """examples:
  largescale assign runs/demo data/shards/fashion-mnist-test assigned/demo-test
  largescale assign runs/demo/checkpoints/step-00001000 data/shards/photos assigned/photos
  torchrun --standalone --nproc-per-node=8 -m largescale assign runs/demo data/shards/photos assigned/photos""",
    "curate": """examples:
  largescale curate features/photos curated/photos --dedup 0.01
  largescale curate features/photos curated/photos --levels 10000,500 --target 20000 --dedup 0.01 --shards data/photos
  torchrun --standalone --nproc-per-node=8 -m largescale curate features/photos curated/photos \\
      --levels 1000000,50000,1000 --target 20000000 --dedup-fraction 0.3""",
    "export": """examples:
  largescale export runs/demo backbone.safetensors
  largescale export runs/demo backbone.safetensors --step 1000 --head --card backbone.md
  largescale export runs/photos photos-resnet50 --format huggingface
  largescale export runs/demo backbone.onnx --format onnx
docs/export.md shows how to load each format.""",
    "prune": """examples:
  largescale prune runs/demo --evaluate linear
  largescale prune runs/demo --rate 0.5 --rounds 6 --rewind 104 parallel.strategy=fsdp
  largescale prune runs/demo --random masks --evaluate linear
  torchrun --standalone --nproc-per-node=8 -m largescale prune runs/photos --rounds 20 --rewind 5000
docs/pruning.md says what is written where.""",
    "plan": """examples:
  largescale plan configs/seer/regnety_256gf.yaml --gpus 512 --gpu v100-32 --images 1e9
  largescale plan configs/swav/resnet50_800ep.yaml parallel.strategy=fsdp --gpus 64 --compare""",
    "status": """example:
  largescale status runs/demo
  largescale status configs/demo.yaml || sbatch launch/slurm/pretrain.sbatch configs/demo.yaml""",
    "preflight": """example:
  torchrun --nnodes=2 --nproc-per-node=8 ... -m largescale preflight configs/swav/resnet50_800ep.yaml""",
    "report": """examples:
  largescale report runs/demo
  largescale report runs/demo runs/other --out compared.html --figures figures
  largescale report runs/demo --watch 60""",
    "runs": """examples:
  largescale runs runs
  largescale runs runs --json""",
}
