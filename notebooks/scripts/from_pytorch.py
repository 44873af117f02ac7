"""Half of a training run in PyTorch, and the other half in Flax NNX.

BatchNorm, an embedding that is tied to the output layer, two groups of
parameters, momentum and a learning rate schedule. The page "From PyTorch
to Flax NNX, Linen and Equinox" explains it.

    pip install torch flax
    python from_pytorch.py
"""

# --- PyTorch ---------------------------------------------------------------
import numpy as np
import torch


STEPS, HALF = 200, 100
TOKENS = np.random.default_rng(0).integers(32, size=(STEPS, 64))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(32, 16)
        self.hidden = torch.nn.Linear(16, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.out = torch.nn.Linear(16, 32, bias=False)
        self.out.weight = self.embed.weight  # tied

    def forward(self, tokens):
        x = self.hidden(self.embed(tokens))
        return self.out(torch.relu(self.norm(x)))


def falling(step):
    return 1 - step / STEPS


torch.manual_seed(0)
theirs = TorchNet()
matrices = [p for p in theirs.parameters() if p.ndim > 1]
vectors = [p for p in theirs.parameters() if p.ndim == 1]
groups = [{"params": matrices, "weight_decay": 1e-3}, {"params": vectors}]
optimizer = torch.optim.RMSprop(groups, lr=1e-3, eps=1e-4, momentum=0.9)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, falling)


def torch_steps(first, last):
    theirs.train()
    for tokens in torch.from_numpy(TOKENS[first:last]):
        logits = theirs(tokens)
        loss = torch.nn.functional.cross_entropy(logits, (tokens + 1) % 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


torch_steps(0, HALF)

# --- Flax NNX --------------------------------------------------------------
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rmsprop_jax import carry_over, dialects, interop


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 16, rngs=rngs)
        self.hidden = nnx.Linear(16, 16, rngs=rngs)
        # PyTorch's momentum of 0.1 is Flax's of 0.9.
        self.norm = nnx.BatchNorm(16, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens):
        x = self.hidden(self.embed(tokens))
        return self.embed.attend(nnx.relu(self.norm(x)))  # tied


def convert(arrays):
    """PyTorch's arrays by name, as a tree like nnx.state(model, nnx.Param)."""
    return {
        "embed": {"embedding": arrays["embed.weight"]},
        "hidden": {
            "kernel": arrays["hidden.weight"].T,
            "bias": arrays["hidden.bias"],
        },
        "norm": {"scale": arrays["norm.weight"], "bias": arrays["norm.bias"]},
    }


def schedule(count):
    return 1e-3 * (1 - count / STEPS)


def labels(params):
    """A function, because a tree of labels has not the boxes of NNX."""
    return jax.tree.map(lambda p: "decay" if p.ndim > 1 else "none", params)


def rule(weight_decay):
    return dialects.pytorch(
        schedule, eps=1e-4, momentum=0.9, weight_decay=weight_decay
    )


# The weights and the running statistics.
weights = {k: v.detach().numpy() for k, v in theirs.named_parameters()}
start = jax.tree.map(jnp.array, convert(weights))  # copies
model = Net(nnx.Rngs(0))
params = nnx.state(model, nnx.Param)
nnx.replace_by_pure_dict(params, start)
nnx.update(model, params)
model.norm.mean[...] = jnp.array(theirs.norm.running_mean.numpy())
model.norm.var[...] = jnp.array(theirs.norm.running_var.numpy())

# The averages, the momentum and the count, which the schedule follows.
tx = optax.partition({"decay": rule(1e-3), "none": rule(0.0)}, labels)
ours = nnx.Optimizer(model, tx, wrt=nnx.Param)
state = interop.from_pytorch(optimizer, theirs, convert)
ours.opt_state = carry_over(state, ours.opt_state)


@nnx.jit
def train_step(model, ours, tokens):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(
            model(tokens), (tokens + 1) % 32
        ).mean()

    ours.update(model, nnx.grad(loss)(model))


model.train()
for tokens in TOKENS[HALF:]:
    train_step(model, ours, tokens)

# --- The same steps in PyTorch, to compare ---------------------------------
torch_steps(HALF, STEPS)
expected = convert(weights)
found = nnx.to_pure_dict(nnx.state(model, nnx.Param))


def norm(tree):
    return float(optax.tree.norm(jax.tree.map(jnp.asarray, tree)))


apart = norm(optax.tree.sub(found, expected))
apart /= norm(optax.tree.sub(expected, start))
print(f"NNX ends {apart:.1e} of PyTorch's way from where PyTorch ends")
