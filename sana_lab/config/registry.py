"""The registry of parts: kind and name to `module:attribute`."""

TABLE: dict[str, dict[str, str]] = {
    "attention": {
        "softmax": "sana_lab.models.attention.softmax:SoftmaxAttention",
        "linear": "sana_lab.models.attention.linear:LinearAttention",
        "mean": "sana_lab.models.attention.mean:MeanAttention",
        "gated_linear": "sana_lab.models.attention.gated_linear:GatedLinear",
        "gated_delta": "sana_lab.models.attention.gated_delta:GatedDelta",
        "mhla": "sana_lab.models.attention.mhla:Mhla",
        "conv": "sana_lab.models.attention.conv:ConvMixer",
    },
    "ffn": {
        "mix": "sana_lab.models.layers:MixFfn",
        "mlp": "sana_lab.models.layers:Mlp",
    },
    "dit": {
        "sana": "sana_lab.models.dit.sana:Sana",
    },
    "autoencoder": {
        "vae": "sana_lab.models.autoencoders.vae:Vae",
        "dcae": "sana_lab.models.autoencoders.dcae:DcAe",
    },
    "text_encoder": {
        "t5": "sana_lab.models.text.t5:T5",
        "llm": "sana_lab.models.text.llm:Llm",
        "encoder": "sana_lab.models.text.encoder:Encoder",
        "label": "sana_lab.models.text.label:Label",
        "adapter": "sana_lab.models.text.adapter:TextAdapter",
    },
    "solver": {
        "euler": "sana_lab.diffusion.solvers:euler",
        "heun": "sana_lab.diffusion.solvers:heun",
        "dpmpp": "sana_lab.diffusion.solvers:dpmpp",
        "rf_solver": "sana_lab.diffusion.solvers:rf_solver",
        "unipc": "sana_lab.diffusion.unipc:unipc",
        "scm": "sana_lab.diffusion.scm:scm",
        "meanflow": "sana_lab.diffusion.meanflow:meanflow",
    },
    "cache": {
        "first_block": "sana_lab.diffusion.step_cache:FirstBlockCache",
        "tea": "sana_lab.diffusion.step_cache:TeaCache",
    },
    "regions": {
        "fixed": "sana_lab.diffusion.regions:Fixed",
        "relations": "sana_lab.evaluation.geneval.regions:Relations",
    },
    "optimizer": {
        "adamw": "torch.optim:AdamW",
        "adam": "torch.optim:Adam",
        "sgd": "torch.optim:SGD",
        "muon": "sana_lab.systems.muon:Muon",
        "came": "sana_lab.systems.came:Came",
        "adamw_8bit": "sana_lab.systems.adamw_8bit:AdamW8bit",
    },
    "adapter": {
        "lora": "sana_lab.systems.lora:Lora",
    },
    "method": {
        "repa": "sana_lab.methods.repa:Repa",
        "irepa": "sana_lab.methods.irepa:Irepa",
        "contrastive": "sana_lab.methods.contrastive:Contrastive",
        "tread": "sana_lab.methods.tread:Tread",
        "dispersive": "sana_lab.methods.dispersive:Dispersive",
        "direction": "sana_lab.methods.direction:Direction",
        "meanflow": "sana_lab.methods.meanflow:MeanFlow",
        "distill": "sana_lab.methods.distill:Distill",
        "front_channels": "sana_lab.methods.front_channels:FrontChannels",
    },
    "data": {
        "shapes": "sana_lab.shapes.data:Shapes",
        "emoji": "sana_lab.emoji.data:Emoji",
        "folder": "sana_lab.data.folder:Folder",
        "latents": "sana_lab.data.latents:Latents",
        "features": "sana_lab.data.features:Features",
        "pictures": "sana_lab.data.pictures:Pictures",
        "cached": "sana_lab.data.cached:Cached",
    },
    "layout": {
        "folder": "sana_lab.data.layouts.folder:FolderLayout",
        "tars": "sana_lab.data.layouts.tars:Tars",
        "tables": "sana_lab.data.layouts.tables:Tables",
        "mjhq": "sana_lab.data.layouts.mjhq:Mjhq",
        "pd12m": "sana_lab.data.layouts.pd12m:Pd12m",
        "classes": "sana_lab.data.layouts.classes:Classes",
    },
    "system": {
        "autoencoder": "sana_lab.systems.autoencoder:AutoencoderSystem",
        "dit": "sana_lab.systems.dit:DitSystem",
        "text2image": "sana_lab.systems.text2image:TextToImage",
        "attributes": "sana_lab.shapes.train_attributes:AttributesSystem",
        "clip": "sana_lab.shapes.train_clip:ClipSystem",
        "emoji_features": "sana_lab.emoji.train_features:EmojiFeatures",
    },
    "extractor": {
        "inception": "sana_lab.evaluation.extractors.inception:Inception",
        "dinov2": "sana_lab.evaluation.extractors.dinov2:Dinov2",
        "clip": "sana_lab.evaluation.extractors.clip:Clip",
        "shapes": "sana_lab.shapes.extractor:Shapes",
        "emoji": "sana_lab.emoji.extractor:EmojiExtractor",
        "function": "sana_lab.evaluation.extractors.function:Function",
    },
    "detector": {
        "shapes": "sana_lab.shapes.detector:ShapesDetector",
        "mask2former": "sana_lab.evaluation.geneval.detectors.mask2former:Mask2Former",
        "owlv2": "sana_lab.evaluation.geneval.detectors.owlv2:Owlv2",
    },
    "vqa": {
        "blip": "sana_lab.evaluation.vqa.blip:Blip",
    },
    "measure": {
        "geneval": "sana_lab.evaluation.geneval.measure:GenEval",
        "distances": "sana_lab.evaluation.distances.measure:Distances",
        "clip_score": "sana_lab.evaluation.clip_score:ClipScore",
        "exact_shapes": "sana_lab.shapes.exact:ExactShapes",
        "clip_shapes": "sana_lab.shapes.clip_score:ClipShapes",
        "emoji": "sana_lab.emoji.measure:EmojiMeasure",
        "dpg": "sana_lab.evaluation.dpg:Dpg",
        "image_reward": "sana_lab.evaluation.image_reward:ImageReward",
        "hps": "sana_lab.evaluation.hps:Hps",
    },
    "probe": {
        "image": "sana_lab.bench.probes.image:Image",
        "peer": "sana_lab.bench.probes.peer:PeerImage",
        "text": "sana_lab.bench.probes.text:TextProbe",
        "attention": "sana_lab.bench.probes.attention:AttentionPair",
        "mixer": "sana_lab.bench.probes.mixer:MixerProbe",
        "image_blocks": "sana_lab.bench.probes.image_blocks:ImageBlocks",
        "peer_blocks": "sana_lab.bench.probes.peer_blocks:PeerBlocks",
    },
    "executor": {
        "local": "sana_lab.ablation.executors.local:Local",
        "ray": "sana_lab.ablation.executors.ray_cluster:RayCluster",
        "slurm": "sana_lab.ablation.executors.slurm:Slurm",
    },
    "search": {
        "optuna": "sana_lab.ablation.search.optuna_search:OptunaSearch",
    },
    "pruner": {
        "asha": "sana_lab.ablation.pruners.asha:Asha",
    },
}
"""kind -> name -> "module:attribute", resolved when it is used. A new part is one line here."""

KINDS: dict[str, str] = {
    "attention": "mixer of the tokens in a DiT's blocks: self-attention, or what replaces it",
    "ffn": "feed-forward network of a DiT's blocks",
    "dit": "denoiser: latents, time and text to a velocity",
    "autoencoder": "images to latents and back",
    "text_encoder": "prompts to features",
    "solver": "ODE solver that samples",
    "cache": "reuse of the blocks between steps of sampling, an approximation (`sampling.cache`)",
    "regions": "regions of a picture with prompts of their own (`sampling.regions`)",
    "optimizer": "optimiser that trains",
    "adapter": "small modules that train in place of the DiT's weights",
    "method": "training method beside the objective: loss terms, modules, token routing",
    "data": "data set: images or latents with captions",
    "layout": "how pictures with captions lie on the disk (`layout` of data `pictures`)",
    "system": "what is trained: networks, losses and optimiser",
    "extractor": "images to features, for distances between sets of images",
    "detector": "images to objects, for GenEval",
    "vqa": "questions about images to answers, for DPG-Bench",
    "measure": "quality measure of a suite (`eval.measures`)",
    "probe": "cost measurement of an efficiency table",
    "executor": "where the trials of an ablation run (`executor:`, or `--executor`)",
    "search": "what proposes the trials of an ablation by their results (`search:`)",
    "pruner": "what ends trainings of a search early (`pruner` of a search)",
}
"""kind -> what its parts do, in words."""

PRESETS: dict[str, str] = {"autoencoder": "sana_lab.models.autoencoders.presets:SPECS"}
"""kind -> location of its presets (name -> spec). A preset is used like a part's name, and options override it."""

BASES: dict[str, str] = {
    "attention": "sana_lab.models.attention:Mixer",
    "ffn": "torch.nn:Module",
    "dit": "sana_lab.models.dit:Dit",
    "autoencoder": "sana_lab.models.autoencoders:Autoencoder",
    "text_encoder": "sana_lab.models.text:TextEncoder",
    "cache": "sana_lab.diffusion.step_cache:StepCache",
    "regions": "sana_lab.diffusion.regions:Regions",
    "optimizer": "torch.optim:Optimizer",
    "adapter": "sana_lab.systems.adapters:Adapter",
    "method": "sana_lab.methods:Method",
    "data": "sana_lab.data:DataModule",
    "layout": "sana_lab.data.layouts:Layout",
    "system": "sana_lab.systems:System",
    "extractor": "sana_lab.evaluation:Extractor",
    "detector": "sana_lab.evaluation.geneval.detectors:Detector",
    "vqa": "sana_lab.evaluation.vqa:Vqa",
    "measure": "sana_lab.evaluation:Measure",
    "probe": "sana_lab.bench.probes:Probe",
    "executor": "sana_lab.ablation.executors:Executor",
    "search": "sana_lab.ablation.search:Search",
    "pruner": "sana_lab.ablation.pruners:Pruner",
}
"""kind -> required base class. Other kinds are functions, identified by their first parameters."""

LEADING: dict[str, tuple[str, ...]] = {"solver": ("velocity", "x", "times"), "optimizer": ("params",)}
"""Parameters that code supplies although the signature does not say so."""

STEP_FLOPS = "sana_lab.bench.training_cost:step_flops"
"""What counts the FLOPs of a training step, for `trainer.max_flops`."""

WEIGHTED = ("autoencoder", "dit", "text_encoder")
"""Kinds whose spec may say `weights:`, a file or `experiment:NAME`, loaded after building."""

RENAMED: dict[str, dict[str, str]] = {"text_encoder": {"drawn": "random_init"}}
"""kind -> an option's earlier name, which saved configurations still have -> its name."""
