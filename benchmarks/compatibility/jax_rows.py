"""Losses with JAX, and with packages that build on it."""

import jax
import jax.numpy as jnp

from benchmarks.compatibility.rows import Loss, Made, Rows

ROWS = Rows()


def draw(*shape: int) -> jax.Array:
    """Return random numbers, the same at each run."""
    return jax.random.normal(jax.random.key(sum(shape)), shape, jnp.float64)


def at(loss: Loss, *shape: int) -> Made:
    """Return a loss of ``params["w"]``, at random numbers."""
    return loss, {"w": draw(*shape)}


@ROWS.add("jax", "`jax.nn.dot_product_attention`", "right")
def _attention() -> Made:
    return at(lambda p: jnp.square(jax.nn.dot_product_attention(*p["w"])).mean(), 3, 5, 2, 4)


@ROWS.add("jax", "`jnp.hypot` at equal arguments", "wrong", "`jnp.sqrt(x**2 + y**2)`")
def _hypot() -> Made:
    return lambda p: jnp.hypot(p["w"][0], p["w"][1]), {"w": jnp.array([0.7, 0.7])}


@ROWS.add("jax", "the same, as `jnp.sqrt(x**2 + y**2)`", "right")
def _root() -> Made:
    return lambda p: jnp.sqrt(p["w"][0] ** 2 + p["w"][1] ** 2), {"w": jnp.array([0.7, 0.7])}


@ROWS.add("jax", "`jnp.linalg.norm` of a vector of zeros", "nan", "`jnp.sqrt((x**2).sum() + eps)`")
def _norm() -> Made:
    return lambda p: jnp.linalg.norm(p["w"]), {"w": jnp.zeros(3)}


@ROWS.add("optax", "losses, such as `sigmoid_binary_cross_entropy` and `huber_loss`", "right")
def _losses() -> Made:
    import optax

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        return (optax.sigmoid_binary_cross_entropy(p["w"], 0.3) + optax.huber_loss(p["w"], 0.1)).sum()

    return at(loss, 5)


def solved(adjoint: str | None) -> Made:
    """Return the end of a differential equation, by its matrix."""
    import diffrax

    term = diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y))
    options = {"stepsize_controller": diffrax.PIDController(1e-9, 1e-9), "max_steps": 256}
    if adjoint:
        options["adjoint"] = getattr(diffrax, adjoint)()

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        solution = diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, 0.1, draw(3), args=p["w"], **options)
        assert solution.ys is not None
        return solution.ys[-1].sum()

    return at(loss, 3, 3)


@ROWS.add("diffrax", "`diffeqsolve` with the default adjoint", "raises", "`adjoint=DirectAdjoint()`")
def _diffrax() -> Made:
    return solved(None)


@ROWS.add("diffrax", "the same, `adjoint=DirectAdjoint()`", "right")
def _diffrax_direct() -> Made:
    return solved("DirectAdjoint")


@ROWS.add("lineax", "`linear_solve` by `CG`", "right")
def _lineax() -> Made:
    import lineax

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        matrix = p["w"] @ p["w"].T + jnp.eye(3)
        operator = lineax.MatrixLinearOperator(matrix, lineax.positive_semidefinite_tag)
        return lineax.linear_solve(operator, draw(3), lineax.CG(rtol=1e-10, atol=1e-10)).value.sum()

    return at(loss, 3, 3)


@ROWS.add("optimistix", "`minimise` by `BFGS`", "right")
def _optimistix() -> Made:
    import optimistix

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        inner = lambda y, w: ((y - w) ** 2).sum() + (y**4).sum()  # noqa: E731
        solver = optimistix.BFGS(rtol=1e-10, atol=1e-10)
        return (optimistix.minimise(inner, solver, jnp.zeros(3), p["w"]).value ** 2).sum()

    return at(loss, 3)


@ROWS.add("numpyro", "log densities, such as `Gamma` and `Dirichlet`", "right")
def _numpyro() -> Made:
    import numpyro.distributions as dist

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        shape = jnp.exp(p["w"])
        return -dist.Gamma(shape[0], shape[1]).log_prob(1.3) - dist.Dirichlet(shape[2:]).log_prob(jnp.array([0.2, 0.8]))

    return at(loss, 4)


@ROWS.add("numpyro", "`BetaBinomial` at equal concentrations", "wrong", "change one concentration by 1e-3")
def _beta_binomial() -> Made:
    import numpyro.distributions as dist

    return lambda p: -dist.BetaBinomial(p["w"][0], p["w"][1], 10).log_prob(4), {"w": jnp.array([1.5, 1.5])}


@ROWS.add("numpyro", "the same, with one of them larger by 1e-3", "right")
def _beta_binomial_apart() -> Made:
    import numpyro.distributions as dist

    return lambda p: -dist.BetaBinomial(p["w"][0], p["w"][1], 10).log_prob(4), {"w": jnp.array([1.5, 1.501])}


@ROWS.add("tinygp", "`GaussianProcess` with `ExpSquared`", "right")
def _tinygp() -> Made:
    import tinygp

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        kernel = jnp.exp(p["w"][0]) * tinygp.kernels.ExpSquared(jnp.exp(p["w"][1]))
        return -tinygp.GaussianProcess(kernel, jnp.linspace(0, 3, 6), diag=0.1).log_probability(draw(6))

    return at(loss, 2)


def normalized(name: str) -> Made:
    """Return a layer of flax with a normalization of its weights."""
    from flax import nnx

    rngs = nnx.Rngs(0)
    norm = getattr(nnx, name)(nnx.Linear(4, 3, param_dtype=jnp.float64, rngs=rngs), rngs=rngs)
    graph, params, rest = nnx.split(norm, nnx.Param, ...)

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        return jnp.tanh(nnx.merge(graph, p["params"], rest, copy=True)(draw(6, 4))).mean()

    return loss, {"params": params}


@ROWS.add("flax", "`nnx.SpectralNorm`", "wrong", "`nnx.WeightNorm`")
def _spectral_norm() -> Made:
    return normalized("SpectralNorm")


@ROWS.add("flax", "`nnx.WeightNorm`", "right")
def _weight_norm() -> Made:
    return normalized("WeightNorm")
