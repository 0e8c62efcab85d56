"""nearest, em, seed: against brute force in float64, and by hand."""

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.moves import em as em_module
from gptvq_jax.moves.em import GroupData, assign, em, update
from gptvq_jax.moves.nearest import lookup, nearest, nearest_few
from gptvq_jax.moves.seed import SEEDS, cdf, kmeans_plus_plus, mahalanobis, random_points

GROUPS, POSITIONS, DIM, ROWS, SIZE = 2, 3, 2, 6, 5
fast_em = jax.jit(em)
fast_assign = jax.jit(assign)
fast_update = jax.jit(update)
fast_kmeans = jax.jit(kmeans_plus_plus, static_argnames="codebook_size")
fast_mahalanobis = jax.jit(mahalanobis, static_argnames="codebook_size")
fast_random = jax.jit(random_points, static_argnames="codebook_size")


def keys_of(data, seed):
    """A random key for each of the groups."""
    return jax.random.split(jax.random.key(seed), len(data.points))


def group_data(seed=0, skew=1.0) -> GroupData:
    """Random vectors, upper triangular metrics, some weights 0; all of it is (G, J, D, r)."""
    rng = np.random.default_rng(seed)
    whiten = np.triu(rng.normal(size=(POSITIONS, DIM, DIM))) + 2 * np.eye(DIM)
    whiten = whiten * np.array([skew, 1])[:, None]
    weight = rng.uniform(0.5, 2, (GROUPS, POSITIONS, ROWS))
    weight[:, :, -1] = 0
    points = rng.normal(size=(GROUPS, POSITIONS, DIM, ROWS))
    return GroupData(*(jnp.asarray(a, jnp.float32) for a in (points, whiten, weight)))


def flat(data: GroupData, group: int):
    """Points (N, D), metrics (N, D, D) and weights (N,) of one group, float64."""
    points, whiten, weight = (np.asarray(a, np.float64) for a in data)
    points = points[group].transpose(0, 2, 1).reshape(-1, points.shape[2])
    whiten = np.repeat(whiten, weight.shape[2], axis=0)
    return points, whiten, weight[group].reshape(-1)


def random_centroids(seed=0):
    centroids = np.random.default_rng(seed + 100).normal(size=(GROUPS, SIZE, DIM))
    return jnp.asarray(centroids, jnp.float32)


# nearest, lookup


@pytest.mark.parametrize("size, dim", [(5, 1), (16, 3), (37, 2)])
def test_nearest_against_brute_force(size, dim):
    rng = np.random.default_rng(size)
    points = rng.normal(size=(3, dim, 50)).astype(np.float32)
    centroids = rng.normal(size=(3, size, dim)).astype(np.float32)
    codes, distance = jax.jit(nearest)(points, centroids)
    table = ((points[:, None] - centroids[..., None]) ** 2).sum(2)  # (3, K, 50)
    assert codes.shape == distance.shape == (3, 50) and codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, table.argmin(1))
    np.testing.assert_allclose(distance, table.min(1), rtol=1e-5)
    if size == 37:
        assert set(np.unique(codes)) >= {0, 36}  # both ends of the padded last chunk


def test_nearest_breaks_ties_to_the_lowest_index():
    centroids = np.array([[1.0], [-1.0], [1.0]] + [[9.0]] * 15 + [[-1.0], [3.0]])  # 20 of them
    codes, distance = nearest(jnp.array([[0.0, 1.0, -1.0, 2.0, 9.0]]), jnp.asarray(centroids))
    np.testing.assert_array_equal(codes, [0, 0, 1, 0, 3])
    np.testing.assert_array_equal(distance, [1, 0, 0, 1, 0])


def test_nearest_never_returns_a_padded_centroid():
    points = jnp.array([[1e15, -1e15, jnp.inf, jnp.nan]])
    codes, _ = nearest(points, jnp.linspace(-1, 1, 17)[:, None])
    assert codes.max() < 17
    np.testing.assert_array_equal(codes[2:], 0)


@pytest.mark.parametrize("size, count", [(5, 5), (16, 1), (37, 3)])
def test_nearest_few_against_a_sorted_table(size, count):
    """Lanes of points share the centroids of their group."""
    rng = np.random.default_rng(size)
    points = rng.normal(size=(2, 3, 2, 40)).astype(np.float32)  # lanes, groups, D, N
    centroids = rng.normal(size=(3, size, 2)).astype(np.float32)
    codes, distance = jax.jit(nearest_few, static_argnums=2)(points, centroids, count)
    table = ((points[:, :, None] - centroids[None, ..., None]) ** 2).sum(3)  # (2, 3, K, 40)
    order = np.argsort(table, axis=2, kind="stable")[:, :, :count]
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, np.moveaxis(order, 2, 0))
    expected = np.moveaxis(np.sort(table, axis=2)[:, :, :count], 2, 0)
    np.testing.assert_allclose(distance, expected, rtol=1e-5)


def test_nearest_few_puts_the_lower_index_first_where_they_tie():
    centroids = jnp.array([[1.0], [-1.0], [3.0], [1.0], [-1.0], [1.0], [-3.0]])
    codes, distance = nearest_few(jnp.array([[0.0, 1.0, 2.0, 9.0]]), centroids, 4)
    np.testing.assert_array_equal(codes.T, [[0, 1, 3, 4], [0, 3, 5, 1], [0, 2, 3, 5], [2, 0, 3, 5]])
    np.testing.assert_array_equal(
        distance.T, [[1, 1, 1, 1], [0, 0, 0, 4], [1, 1, 1, 1], [36, 64, 64, 64]]
    )


def test_there_are_not_more_nearest_than_centroids():
    with pytest.raises(ValueError, match="there are 3 centroids, not count=4"):
        nearest_few(jnp.zeros((2, 5)), jnp.zeros((3, 2)), 4)


def test_lookup_by_hand():
    centroids = jnp.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])  # 2 books, K = 2
    picked = lookup(centroids, jnp.array([[1, 0, 1], [0, 0, 1]]))
    np.testing.assert_array_equal(picked[0], [[3, 1, 3], [4, 2, 4]])
    np.testing.assert_array_equal(picked[1], [[5, 5, 7], [6, 6, 8]])


# EM


def test_e_step_against_brute_force():
    data, centroids = group_data(), random_centroids()
    codes, losses = fast_assign(data, centroids)
    for g in range(GROUPS):
        points, whiten, weight = flat(data, g)
        book = np.asarray(centroids[g], np.float64)
        expected = [ref.nearest(x, book, t) for x, t in zip(points, whiten, strict=True)]
        np.testing.assert_array_equal(codes[g].reshape(-1), expected)
        np.testing.assert_allclose(losses[g], ref.em_loss(points, whiten, weight, book), rtol=1e-5)


def test_m_step_against_float64():
    data, start = group_data(), random_centroids()
    codes, _ = fast_assign(data, start)
    updated = fast_update(data, codes, start)
    for g in range(GROUPS):
        expected = ref.em(*flat(data, g), start[g], 1)
        np.testing.assert_allclose(updated[g], expected, atol=1e-4)


def test_em_against_float64_over_iterations():
    data, start = group_data(), random_centroids()
    for iterations in (0, 1, 4):
        centroids = fast_em(data, start, iterations)
        for g in range(GROUPS):
            np.testing.assert_allclose(
                centroids[g], ref.em(*flat(data, g), start[g], iterations), atol=2e-4
            )


@pytest.mark.parametrize("seed", range(5))
def test_em_loss_never_rises(seed):
    data, start = group_data(seed, skew=30.0), random_centroids(seed)
    losses = [fast_assign(data, fast_em(data, start, n))[1] for n in range(8)]
    for before, after in zip(losses, losses[1:], strict=False):
        assert (after <= before * (1 + 1e-5) + 1e-6).all()
    assert (losses[-1] < losses[0]).all()


def test_as_many_centroids_as_distinct_points_is_lossless_and_fixed():
    distinct = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [4.0, 4.0], [-3.0, 2.0]])
    picks = np.arange(GROUPS * POSITIONS * ROWS).reshape(GROUPS, POSITIONS, ROWS) % 5
    points = jnp.asarray(np.moveaxis(distinct[picks], -1, 2), jnp.float32)
    data = group_data()._replace(points=points)
    book = jnp.broadcast_to(jnp.asarray(distinct, jnp.float32), (GROUPS, SIZE, DIM))
    np.testing.assert_allclose(fast_em(data, book, 3), book, atol=1e-6)
    seeds = fast_kmeans(data._replace(weight=jnp.ones_like(data.weight)), SIZE, keys_of(data, 0))
    for g in range(GROUPS):  # k-means++ finds all five: a point seeded before has no mass left
        np.testing.assert_array_equal(np.unique(seeds[g], axis=0), np.unique(distinct, axis=0))
    assert fast_assign(data, seeds)[1].max() == 0


def test_points_of_weight_zero_and_padded_positions_have_no_influence():
    data, start = group_data(), random_centroids()
    garbage = data.points.at[..., -1].set(77.0)  # the last row weighs nothing
    expected = fast_em(data, start, 3)
    np.testing.assert_array_equal(fast_em(data._replace(points=garbage), start, 3), expected)
    off = data._replace(whiten=data.whiten.at[-1].set(0.0))  # a position of column padding
    garbage = off.points.at[:, -1].set(77.0)
    moved = fast_em(off._replace(points=garbage), start, 3)
    np.testing.assert_allclose(moved, fast_em(off, start, 3), rtol=1e-5)
    assert fast_assign(off._replace(points=garbage), start)[1].max() < 1e3


def test_empty_centroid_stays():
    data, start = group_data(), random_centroids().at[:, 3].set(1e3)
    np.testing.assert_array_equal(fast_em(data, start, 3)[:, 3], 1e3)


def test_skewed_metric_is_obeyed():
    """Fitting in the metric of the loss beats fitting in the Euclidean one."""
    data = group_data(skew=20.0)
    plain = data._replace(whiten=jnp.broadcast_to(jnp.eye(DIM), data.whiten.shape))
    start = fast_kmeans(data, SIZE, keys_of(data, 1))
    weighted = fast_assign(data, fast_em(data, start, 10))[1].sum()
    euclidean = fast_assign(data, fast_em(plain, start, 10))[1].sum()
    assert weighted < 0.7 * euclidean


@pytest.mark.parametrize("cells, chunks", [(40, 2), (9, 6)])
def test_chunks_of_positions_are_summed(monkeypatch, cells, chunks):
    """6 positions of 2 x 5 centroids; where one position is too many already, one at a time."""
    first, second = group_data(), group_data(1)
    data = GroupData(
        jnp.concatenate([first.points, second.points], axis=1),
        jnp.concatenate([first.whiten, second.whiten]),
        jnp.concatenate([first.weight, second.weight], axis=1),
    )
    start = random_centroids()
    monkeypatch.setattr(em_module, "_CHUNK_CELLS", cells)
    assert em_module._chunks(data, start).whiten.shape == (chunks, 6 // chunks, DIM, DIM)

    @jax.jit  # a new function, for jit keeps the programs of those it has seen
    def both_steps(data, start):
        codes, losses = assign(data, start)
        return codes, losses, update(data, codes, start)

    codes, losses, updated = both_steps(data, start)
    for g in range(GROUPS):
        points, whiten, weight = flat(data, g)
        expected = [ref.nearest(x, start[g], t) for x, t in zip(points, whiten, strict=True)]
        np.testing.assert_array_equal(codes[g].reshape(-1), expected)
        loss = ref.em_loss(points, whiten, weight, np.asarray(start[g], np.float64))
        np.testing.assert_allclose(losses[g], loss, rtol=1e-5)
        expected = ref.em(points, whiten, weight, start[g], 1)
        np.testing.assert_allclose(updated[g], expected, atol=1e-4)


# seeds


def points_of_weight(data: GroupData) -> list[set]:
    """The points of each group that a seed may be."""
    return [
        {tuple(x) for x, w in zip(points.astype(np.float32), weight, strict=True) if w > 0}
        for points, _, weight in (flat(data, g) for g in range(GROUPS))
    ]


def test_random_points_are_distinct_points_of_positive_weight():
    data = group_data()
    data = data._replace(weight=data.weight.at[:, 0, :4].set(0.0))
    allowed, drawn = points_of_weight(data), [set(), set()]
    for n in range(40):
        seeds = np.asarray(fast_random(data, SIZE, keys_of(data, n)))
        assert seeds.shape == (GROUPS, SIZE, DIM)
        for g in range(GROUPS):
            book = {tuple(x) for x in seeds[g]}
            assert len(book) == SIZE and book <= allowed[g]
            drawn[g] |= book
    assert drawn == allowed  # every point can be drawn
    again = fast_random(data, SIZE, keys_of(data, 39))
    np.testing.assert_array_equal(again, seeds)
    assert (fast_random(data, SIZE, keys_of(data, 40)) != seeds).any()


def test_random_points_repeat_where_centroids_are_more():
    """5 points of weight in one group, 10 in the other: all are there about equally often."""
    data = group_data()
    weight = jnp.zeros_like(data.weight).at[0, 0, :5].set(1.0).at[1, 1:, :5].set(2.0)
    data = data._replace(weight=weight)
    allowed = points_of_weight(data)
    assert [len(points) for points in allowed] == [5, 10]
    for size in (12, 40):  # fewer and more than all 18 points, those without weight included
        seeds = np.asarray(fast_random(data, size, keys_of(data, 0)))
        for g in range(GROUPS):
            book, times = np.unique(seeds[g], axis=0, return_counts=True)
            assert {tuple(x) for x in book} == allowed[g]
            assert times.max() - times.min() <= 1 and times.sum() == size


def test_random_points_are_drawn_in_proportion_to_weight():
    """0, 1, 2 of weights 1, 2, 5, without replacement; the metric and the points play no part."""
    points = jnp.arange(3.0).reshape(1, 3, 1, 1)
    data = GroupData(points, jnp.arange(3.0).reshape(3, 1, 1), jnp.array([[[1.0], [2], [5]]]))
    draw = jax.jit(jax.vmap(lambda key: random_points(data, 2, key[None])[0, :, 0]))
    seeds = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    shares = [(seeds[:, 0] == x).mean() for x in range(3)]
    np.testing.assert_allclose(shares, [1 / 8, 2 / 8, 5 / 8], atol=0.03)  # four deviations
    second = (seeds[seeds[:, 0] == 2, 1] == 1).mean()  # of what is left, 1 and 2
    assert abs(second - 2 / 3) < 0.04


def test_kmeans_seeds_are_points_of_positive_weight():
    data = group_data()
    weight = data.weight.at[:, 0, :4].set(0.0)  # also at the head, where a search could fall back
    data = data._replace(weight=weight)
    allowed, drawn = points_of_weight(data), [set(), set()]
    for n in range(40):
        seeds = np.asarray(fast_kmeans(data, SIZE, keys_of(data, n)))
        assert seeds.shape == (GROUPS, SIZE, DIM)
        for g in range(GROUPS):
            book = {tuple(x) for x in seeds[g]}
            assert len(book) == SIZE  # no point twice
            assert book <= allowed[g]
            drawn[g] |= book
    assert drawn == allowed  # every point can be drawn


def test_kmeans_draws_in_proportion_to_weight_and_squared_distance():
    # First seed: only point A (0, 0) has mass; then B at distance 1, weight 3, and C at distance
    # 2, weight 1/4, so that B is drawn with probability 3 / (3 + 1).
    points = jnp.zeros((1, 3, 1, 1)).at[0, 1].set(1.0).at[0, 2].set(2.0)
    whiten = jnp.ones((3, 1, 1))
    data = GroupData(points, whiten, jnp.array([1e6, 3.0, 0.25]).reshape(1, 3, 1))
    draw = jax.jit(jax.vmap(lambda key: kmeans_plus_plus(data, 2, key[None])[0, :, 0]))
    seeds = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    assert (seeds[:, 0] == 0).mean() > 0.99
    share = (seeds[:, 1] == 1).mean()
    assert abs(share - 0.75) < 0.04  # four standard deviations


def test_kmeans_depends_on_the_key_only():
    data = group_data()
    one, same = (fast_kmeans(data, SIZE, keys_of(data, 3)) for _ in range(2))
    np.testing.assert_array_equal(one, same)
    assert (one != fast_kmeans(data, SIZE, keys_of(data, 4))).any()


def test_mahalanobis_order_by_hand():
    # x spreads 10 times wider than y; in units of spread the order is origin, (10, 0), (0, 2), ...
    xy = np.array([(0, 0), (10, 0), (-10, 0), (0, 3), (0, -3), (40, 0), (-40, 0), (0, 9), (0, -9)])
    x2, y2 = (xy.T**2).mean(1)
    distance = xy[:, 0] ** 2 / x2 + xy[:, 1] ** 2 / y2
    np.testing.assert_array_equal(np.argsort(distance, kind="stable")[:3], [0, 1, 2])
    points = jnp.asarray(xy.T[None, None], jnp.float32)  # (1, 1, 2, 9)
    data = GroupData(points, jnp.eye(2)[None], jnp.ones((1, 1, 9)))
    # K = 3 of 9 points: ranks floor((k + 1/2) / 3 * 9) = 1, 4, 7
    seeds = np.asarray(fast_mahalanobis(data, 3, keys_of(data, 0))[0])
    np.testing.assert_allclose(
        seeds[:, 0] ** 2 / x2 + seeds[:, 1] ** 2 / y2, np.sort(distance)[[1, 4, 7]], rtol=1e-6
    )


def test_mahalanobis_against_float64_leaves_weight_zero_out():
    data = group_data()
    seeds = fast_mahalanobis(data, SIZE, keys_of(data, 0))
    for g in range(GROUPS):
        points, _, weight = flat(data, g)
        np.testing.assert_allclose(seeds[g], ref.mahalanobis(points[weight > 0], SIZE), rtol=1e-6)


def test_cdf_is_the_quantiles():
    # weights 0..9 in any order, K = 5: ranks floor((k + 1/2) / 5 * 10) = 1, 3, 5, 7, 9
    values = np.random.default_rng(0).permutation(10).astype(np.float32)
    points = jnp.asarray(np.append(values, [99.0, -99.0])).reshape(1, 2, 1, 6)
    weight = jnp.ones(12).at[10:].set(0.0).reshape(1, 2, 6)
    seeds = cdf(
        GroupData(points, jnp.ones((2, 1, 1)), weight), 5, jax.random.split(jax.random.key(0), 2)
    )
    np.testing.assert_array_equal(seeds[0, :, 0], [1, 3, 5, 7, 9])


def test_cdf_needs_scalars():
    with pytest.raises(ValueError, match="dim=1"):
        cdf(group_data(), 4, keys_of(group_data(), 0))


@pytest.mark.parametrize("name", ["mahalanobis", "kmeans++"])
def test_more_centroids_than_points_repeats_points(name):
    points = jnp.arange(4.0).reshape(1, 2, 1, 2)
    data = GroupData(points, jnp.ones((2, 1, 1)), jnp.ones((1, 2, 2)))
    seed = jax.jit(SEEDS[name], static_argnames="codebook_size")
    seeds = np.asarray(seed(data, 8, keys_of(data, 0)))[0, :, 0]
    assert set(seeds) == {0.0, 1.0, 2.0, 3.0}
