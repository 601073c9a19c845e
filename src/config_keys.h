/* config_keys: every configuration key, once. Parser, checks, help, `config reference`, the
 * resolved config and struct md_config are made by walking this table. No include guard: included
 * by X-macro.
 *
 * X(field, key, type, default, min, max, unit, help)
 *   type    BOOL, INT (int64), REAL (double), STR, CHOICE (string out of the comma list in `unit`),
 *           REAL3 (three numbers)
 *   default as it would be typed on the command line; "" means not set (STR)
 *   min/max bounds of INT, REAL and REAL3 (both ends allowed); 0, 0 for the others
 * The keys of one group stand together: `config show` writes the groups in this order. */
// clang-format off

/* run */
X(task, "task", CHOICE, "pretrain", 0, 0, "pretrain,finetune", "What to train: a student by masked image modeling, or a classifier by the images' labels (from finetune.from, or from scratch).")
X(backend, "backend", CHOICE, "cpu", 0, 0, "cpu,check,cuda", "Where the ops run; check = cpu with every op's access rules enforced (slow).")
X(precision, "precision", CHOICE, "auto", 0, 0, "auto,fp32,bf16", "Type of activations and matrix weights; sums, statistics, gradients, master weights and moments are always fp32. auto = bf16 on cuda, else fp32; bf16 needs cuda.")
X(cuda_tune, "cuda.tune", BOOL, "false", 0, 0, "", "Time cuBLASLt's algorithms for every matrix product before training and take the fastest; the choices are kept in the run directory (products.txt) and used again.")
X(threads, "threads", INT, "0", 0, 1024, "threads", "Compute threads of a rank; 0 = its share of the cores it may run on.")
X(run_dir, "run.dir", STR, "", 0, 0, "path", "Run directory; empty = runs/<name of the config file>.")
X(run_seed, "run.seed", INT, "0", 0, 9007199254740991, "", "Seed of initialisation, order, crops, masks and drop path.")

/* data */
X(data_train, "data.train", STR, "", 0, 0, "path", "Image store to train on (made by `md_hpc convert`).")
X(data_split, "data.split", STR, "train", 0, 0, "", "Split of the image store to train on.")
X(data_reader, "data.reader", CHOICE, "pread", 0, 0, "pread,hdf5", "How image bytes are read: pread at the data set's offset in worker threads, or HDF5 on the main thread.")
X(data_workers, "data.workers", INT, "0", 0, 256, "threads", "Loader threads of a rank; 0 = one for every compute thread, at most 8.")
X(data_prefetch, "data.prefetch", INT, "2", 1, 64, "batches", "Micro-batches decoded ahead.")
X(data_max_bad, "data.max_bad", REAL, "0.001", 0, 1, "fraction", "Stop when more than this fraction of an epoch's images (and more than 10) could not be read or decoded.")
X(data_sync, "data.sync", BOOL, "false", 0, 0, "", "Load every batch when it is needed instead of ahead (for measurements).")

/* image and augmentation */
X(image_size, "image.size", INT, "224", 8, 2048, "pixels", "Side of the student's square input.")
X(image_mean, "image.mean", REAL3, "0.485, 0.456, 0.406", 0, 1, "", "Channel means of the student's input, pixels in [0, 1].")
X(image_std, "image.std", REAL3, "0.229, 0.224, 0.225", 0.001, 10, "", "Channel standard deviations of the student's input.")
X(augment_crop_min, "augment.crop_min", REAL, "0.2", 0.0001, 1, "fraction", "Least area of a random resized crop.")
X(augment_crop_max, "augment.crop_max", REAL, "1.0", 0.0001, 1, "fraction", "Largest area of a random resized crop.")
X(augment_ratio_min, "augment.ratio_min", REAL, "0.75", 0.01, 1, "", "Least aspect ratio of a crop.")
X(augment_ratio_max, "augment.ratio_max", REAL, "1.3333333333333333", 1, 100, "", "Largest aspect ratio of a crop.")
X(augment_flip, "augment.flip", REAL, "0.5", 0, 1, "probability", "Horizontal flip.")
X(augment_mixup, "augment.mixup", REAL, "0", 0, 100, "", "Alpha of mixup's Beta distribution (task finetune); 0 = off.")
X(augment_cutmix, "augment.cutmix", REAL, "0", 0, 100, "", "Alpha of CutMix's Beta distribution (task finetune); 0 = off.")
X(augment_mix_probability, "augment.mix_probability", REAL, "1.0", 0, 1, "probability", "That a group of images is mixed at all.")
X(augment_mix_switch, "augment.mix_switch", REAL, "0.5", 0, 1, "probability", "Of CutMix where both are on.")
X(augment_mix_group, "augment.mix_group", INT, "2", 2, 65536, "images", "Consecutive images of a batch that are mixed alike, each with its mirror image in the group's order.")
X(augment_erasing, "augment.erasing", REAL, "0", 0, 1, "probability", "Random erasing: a box of the picture becomes noise (task finetune).")
X(augment_jitter, "augment.jitter", REAL, "0.4", 0, 1, "", "Strength of brightness, contrast and saturation jitter; 0 = off.")
X(augment_randaugment, "augment.randaugment", INT, "0", 0, 8, "ops", "RandAugment (timm's rand-...-inc1): ops drawn for an image; 0 = off.")
X(augment_randaugment_magnitude, "augment.randaugment_magnitude", REAL, "9", 0, 10, "", "Mean magnitude of a RandAugment op.")
X(augment_randaugment_deviation, "augment.randaugment_deviation", REAL, "0.5", 0, 10, "", "Standard deviation of that magnitude, which stays in [0, 10].")
X(augment_randaugment_probability, "augment.randaugment_probability", REAL, "0.5", 0, 1, "probability", "That a drawn RandAugment op is applied.")

/* student */
X(model_width, "model.width", INT, "768", 8, 65536, "channels", "Width C of the student.")
X(model_layers, "model.layers", INT, "12", 1, 1024, "blocks", "Number of blocks L.")
X(model_heads, "model.heads", INT, "12", 1, 1024, "heads", "Attention heads H; divides model.width.")
X(model_mlp, "model.mlp", INT, "0", 0, 262144, "channels", "Hidden width F of the MLP; 0 = 4 * model.width.")
X(model_patch, "model.patch", INT, "16", 1, 256, "pixels", "Patch side P; divides image.size.")
X(model_rel_pos, "model.rel_pos", CHOICE, "shared", 0, 0, "shared,per_layer,none", "Relative position bias tables.")
X(model_abs_pos, "model.abs_pos", BOOL, "false", 0, 0, "", "Learned absolute position embedding.")
X(model_layer_scale, "model.layer_scale", REAL, "0.1", 0, 10, "", "Initial value of layer scale; 0 = no layer scale.")
X(model_drop_path, "model.drop_path", REAL, "0.1", 0, 0.99, "probability", "Drop path of the last block; rises linearly from 0 at the first.")
X(model_drop_path_mode, "model.drop_path_mode", CHOICE, "auto", 0, 0, "auto,skip,mask", "How a branch is dropped for some images: skip computes it for the others only; mask computes it for all and multiplies by zero. The loss and the gradients are the same. auto: skip, but mask with parallel.sequence, which cannot skip.")
X(model_classes, "model.classes", INT, "1000", 2, 1000000, "classes", "Classes of a classifier (task finetune); those of the image store.")
X(model_pool, "model.pool", CHOICE, "mean", 0, 0, "mean,cls", "What a classifier looks at (task finetune): the normalised mean of the patch tokens, or the normalised cls token.")
X(model_last_block, "model.last_block", CHOICE, "chosen", 0, 0, "chosen,all", "Tokens that what follows the last block's attention runs at, in student and teacher: those the loss is taken on, or all. The loss and the gradients are the same.")
X(model_ln_eps, "model.ln_eps", REAL, "1e-6", 1e-12, 1e-2, "", "Epsilon of the student's LayerNorms.")
X(model_init_std, "model.init_std", REAL, "0.02", 1e-6, 1, "", "Standard deviation of the truncated normal initialisation (cut at one sigma).")

/* fine-tuning */
X(finetune_from, "finetune.from", STR, "", 0, 0, "path", "Starting weights of a classifier: a checkpoint, a run directory or a weights file; empty = from scratch.")
X(finetune_head_scale, "finetune.head_scale", REAL, "0.001", 0, 1, "", "Factor on the initial values of the classification head.")
X(finetune_smoothing, "finetune.smoothing", REAL, "0.1", 0, 0.99, "", "Label smoothing.")

/* method axes */
X(teacher_kind, "method.teacher.kind", CHOICE, "vit", 0, 0, "vit,pixel", "Where targets come from: a frozen ViT, or the picture's own patches.")
X(teacher_weights, "method.teacher.weights", STR, "", 0, 0, "path", "Weights of the vit teacher (made by `md_hpc weights import`).")
X(teacher_arch, "method.teacher.arch", CHOICE, "file", 0, 0, "file,clip_vit_b16,clip_vit_l14,vit_b16", "What `plan` takes the teacher for where its weights are not at hand (vit_b16: DINO, MAE, timm); training looks at the weights alone.")
X(teacher_stage, "method.teacher.stage", CHOICE, "ln_post", 0, 0, "raw,ln_post,ln_post_proj", "Feature taken from the teacher: last block, after its final LayerNorm, after its projection.")
X(teacher_layers, "method.teacher.layers", INT, "1", 1, 1024, "blocks", "Targets are the mean of the last k block outputs.")
X(teacher_pos, "method.teacher.pos_interpolation", CHOICE, "beit2", 0, 0, "beit2,exact", "Scale of the bicubic resize of the teacher's positions: (g + 0.1) / G as BEiT v2, or g / G.")
X(teacher_image_size, "method.teacher.image_size", INT, "0", 0, 2048, "pixels", "Side of the teacher's input; 0 = what gives it the student's grid.")
X(target_norm, "method.target.norm", CHOICE, "layernorm", 0, 0, "none,layernorm,patch_norm", "Normalisation of each target vector: LayerNorm without affine, or MAE's (unbiased variance).")
X(target_eps, "method.target.eps", REAL, "1e-6", 1e-12, 1e-2, "", "Epsilon of the target normalisation.")
X(mask_kind, "method.mask.kind", CHOICE, "block", 0, 0, "block,random,none", "How patches are chosen for masking.")
X(mask_ratio, "method.mask.ratio", REAL, "0.4", 0.0, 0.99, "fraction", "Fraction of patches to mask; rounded to a whole number.")
X(mask_count, "method.mask.count", INT, "0", 0, 65536, "patches", "Exact number of patches to mask; 0 = by method.mask.ratio.")
X(mask_min_block, "method.mask.min_block", INT, "16", 1, 65536, "patches", "Least area of a block (kind block).")
X(mask_aspect, "method.mask.aspect", REAL, "0.3", 0.01, 1, "", "Least aspect ratio of a block; the largest is its inverse.")
X(student_mode, "method.student.mode", CHOICE, "replace", 0, 0, "replace", "What the encoder sees of a masked patch: the mask token in its place.")
X(head_kind, "method.head.kind", CHOICE, "linear", 0, 0, "linear", "Prediction head.")
X(loss_kind, "method.loss.kind", CHOICE, "smooth_l1", 0, 0, "smooth_l1,l1,l2", "Distance between prediction and target.")
X(loss_beta, "method.loss.beta", REAL, "2.0", 1e-6, 1000, "", "Where smooth-L1 turns from quadratic to linear.")
X(loss_on, "method.loss.on", CHOICE, "masked", 0, 0, "masked,all", "Tokens the loss is taken on.")

/* optimizer */
X(optim_lr, "optim.lr", REAL, "1.5e-3", 0, 100, "", "Peak learning rate (used as given, whatever the batch).")
X(optim_min_lr, "optim.min_lr", REAL, "1e-5", 0, 100, "", "Learning rate the cosine ends at.")
X(optim_warmup_epochs, "optim.warmup_epochs", REAL, "10", 0, 10000, "epochs", "Linear warm-up from 0.")
X(optim_beta1, "optim.beta1", REAL, "0.9", 0, 0.999999, "", "AdamW decay of the first moment.")
X(optim_beta2, "optim.beta2", REAL, "0.999", 0, 0.9999999, "", "AdamW decay of the second moment.")
X(optim_eps, "optim.eps", REAL, "1e-8", 1e-16, 1, "", "AdamW epsilon.")
X(optim_weight_decay, "optim.weight_decay", REAL, "0.05", 0, 10, "", "Decoupled weight decay of matrices; vectors and biases are not decayed.")
X(optim_layer_decay, "optim.layer_decay", REAL, "1.0", 0.01, 1, "", "Factor on the learning rate from one block to the one before it; 1 = one rate for all.")
X(optim_ema, "optim.ema", REAL, "0", 0, 0.9999999, "", "Decay of a moving average of the parameters, kept beside them (evaluate.ema, weights export --ema); 0 = none.")
X(optim_clip, "optim.clip", REAL, "3.0", 0, 1e9, "", "Global gradient norm to clip to; 0 = off.")
X(optim_max_skipped, "optim.max_skipped", INT, "10", 1, 1000000, "steps", "Stop after this many steps in a row with a non-finite loss or gradient.")

/* training length and batch */
X(train_epochs, "train.epochs", REAL, "300", 1e-6, 1000000, "epochs", "Length of the run, and of the cosine.")
X(train_max_steps, "train.max_steps", INT, "0", 0, 1000000000000, "steps", "Stop (finished) after this step; 0 = at the end of the epochs. The schedule is not changed.")
X(train_batch, "train.batch", INT, "2048", 1, 16777216, "images", "Global batch of one optimizer step.")
X(train_recompute, "train.recompute", INT, "0", 0, 4096, "blocks", "The first so many blocks of the student keep only what they begin with and are run again in the backward pass, but for their last product: less memory, the same numbers, more work. The last block never is, for it would gain nothing; 0 = none, model.layers = all others.")
X(train_micro_batch, "train.micro_batch", INT, "0", 0, 65536, "images", "Images of one forward and backward pass of the ranks that share a model; 0 = all of theirs at once.")

/* evaluation */
X(evaluate_kind, "evaluate.kind", CHOICE, "accuracy", 0, 0, "accuracy,knn,features,probe", "What `md_hpc evaluate` does: measure a classifier's accuracy, or that of nearest neighbours among the features of data.train, or that of a linear classifier of frozen features, trained on data.train; or write what the model sees in every image.")
X(evaluate_from, "evaluate.from", STR, "", 0, 0, "path", "What it evaluates: a checkpoint, a run directory or a weights file; empty = the run directory; none = the model as it is before its first step.")
X(evaluate_ema, "evaluate.ema", BOOL, "false", 0, 0, "", "Evaluate the moving average of the parameters (optim.ema), while training (evaluate.every) too.")
X(evaluate_output, "evaluate.output", STR, "", 0, 0, "path", "Where it writes PATH.json and PATH.csv (hits of every class); empty = evaluation-KIND-SPLIT in the run directory. A probe is kept in PATH.probe, or in probe-RECIPE of the run directory.")
X(evaluate_data, "evaluate.data", STR, "", 0, 0, "path", "Image store to evaluate on; empty = data.train.")
X(evaluate_split, "evaluate.split", STR, "test", 0, 0, "", "Split of that store.")
X(evaluate_every, "evaluate.every", INT, "0", 0, 1000000, "epochs", "Epochs between evaluations of a classifier while it trains, the last one included; 0 = none.")
X(evaluate_batch, "evaluate.batch", INT, "0", 0, 1048576, "images", "Images of one forward pass of the ranks that share a model; 0 = as many as training has.")
X(evaluate_classes, "evaluate.classes", CHOICE, "all", 0, 0, "all,imagenet_a,imagenet_r", "Classes of ImageNet-1k that the store's 200 classes are, in the order of their names; all = the model's own.")
X(evaluate_feature, "evaluate.feature", CHOICE, "mean", 0, 0, "mean,cls,logits", "What is looked at (kinds knn, features, and probe by recipe mae): the mean of the normalised patch tokens, the normalised cls token, or a classifier's logits.")
X(evaluate_knn_k, "evaluate.knn_k", INT, "20", 1, 1000, "images", "Nearest neighbours that vote (kind knn).")
X(evaluate_knn_images, "evaluate.knn_images", INT, "0", 0, 1000000000000, "images", "Only so many of data.train's images vote, the first in stored order, which is shuffled; 0 = all (kind knn).")
X(evaluate_knn_temperature, "evaluate.knn_temperature", REAL, "0.07", 1e-4, 1000, "", "A neighbour's vote is exp(cosine / this) (kind knn).")
X(evaluate_probe_recipe, "evaluate.probe_recipe", CHOICE, "beit", 0, 0, "beit,mae", "How a probe is trained (kind probe): beit, a head behind every block, AdamW; mae, one behind the encoder and batch norm, LARS.")
X(evaluate_probe_epochs, "evaluate.probe_epochs", INT, "0", 0, 100000, "epochs", "How long; 0 = the recipe's 100 (beit) or 90 (mae).")
X(evaluate_probe_batch, "evaluate.probe_batch", INT, "0", 0, 16777216, "images", "Global batch of a step of it; 0 = the recipe's 1024 (beit) or 16384 (mae).")
X(evaluate_probe_lr, "evaluate.probe_lr", REAL, "0", 0, 10000, "", "Peak learning rate of it, used as given; 0 = the recipe's 4e-3 (beit) or 0.1 * batch / 256 (mae).")
X(evaluate_resize, "evaluate.resize", INT, "0", 0, 4096, "pixels", "Short side of a picture before its centre is cut out; 0 = image.size / 0.875, or image.size from 384 pixels on.")

/* parallel */
X(parallel_tensor, "parallel.tensor", INT, "1", 1, 1024, "ranks", "Ranks that share one model (tensor parallel); divides model.heads, model.width and the MLP's width, and the images of a pass. The rest of the ranks is data parallel.")
X(parallel_tensor_across_nodes, "parallel.tensor_across_nodes", BOOL, "false", 0, 0, "", "Let ranks that share a model sit on several nodes (slow).")
X(parallel_sequence, "parallel.sequence", BOOL, "false", 0, 0, "", "Tensor-parallel ranks also share what lies between the cut layers: norms, residuals, layer scale and drop path run on each rank's own images.")
X(parallel_zero, "parallel.zero", INT, "0", 0, 1, "", "1 = ZeRO-1: ranks that hold the same parameters share the optimizer's moments and its work.")
X(parallel_bucket_mib, "parallel.bucket_mib", REAL, "4", 0.001, 1024, "MiB", "Size from which a gradient bucket takes no more parameters; four are under way at once.")
X(parallel_overlap, "parallel.overlap", BOOL, "true", 0, 0, "", "Reduce gradient buckets while the backward pass goes on.")

X(parallel_comm, "parallel.comm", CHOICE, "auto", 0, 0, "auto,mpi,nccl", "What carries gradients and activations between GPUs: NCCL, or MPI through host memory (slow, also where ranks share a GPU); auto = NCCL where every rank has a GPU of its own.")

/* checkpoints, logs, checks */
X(checkpoint_every, "checkpoint.every", INT, "0", 0, 1000000000, "steps", "Steps between checkpoints; 0 = once an epoch. One is always written at the end and when stopped.")
X(checkpoint_keep, "checkpoint.keep", INT, "2", 1, 1000, "files", "Newest checkpoints kept.")
X(checkpoint_keep_every, "checkpoint.keep_every", INT, "0", 0, 1000000000, "steps", "Checkpoints at multiples of this step are kept for ever; 0 = none.")
X(checkpoint_resume, "checkpoint.resume", STR, "auto", 0, 0, "", "Where a run directory without checkpoints starts: auto or none = anew, or a checkpoint's path. Once it has checkpoints, its newest valid one goes first; none is then refused.")
X(log_every, "log.every", INT, "10", 1, 1000000, "steps", "Steps between progress lines; metrics.jsonl has every step.")
X(log_level, "log.level", CHOICE, "info", 0, 0, "debug,info,warn,error", "Least severe message shown.")
X(check_every, "check.every", INT, "0", 0, 1000000000, "steps", "Steps between checks that all replicas hold the same parameters; 0 = off.")
X(hang_seconds, "hang.seconds", INT, "300", 0, 1000000, "seconds", "A rank that does not move for longer (ten times longer outside of steps, or than it ever took) ends the run with exit code 76; 0 = never.")
// clang-format on
