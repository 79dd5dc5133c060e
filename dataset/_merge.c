/* Averages of a score map's probabilities over patches, and the k largest of each; and two small
 * loops over stored maps.
 *
 * The same as the NumPy functions of sampling.py and merging.py, which stay the reference (tests
 * compare the two) and do the work where this module was not compiled. Only for speed: a patch shows
 * a few cells with a few classes each, and NumPy pays for whole arrays of all classes at every step.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Shares below this are rounding: as _NOTHING in sampling.py. */
#define NOTHING 1e-9

/* One view of a map, as it is stored: [cells, k]. */
typedef struct {
    const void *scores; /* float16 or float32 */
    const int32_t *classes;
    const float *rest; /* [cells] */
    Py_ssize_t k;
    int is_half;
} Map;

/* What is known of the cells so far: softmax and columns of those met, and the classes' ids. */
typedef struct {
    Map map;
    float *probs;     /* [cells, k] */
    int32_t *columns; /* [cells, k]; the first of a cell is -1 until the cell is met */
    int32_t *slots;   /* hash table of columns, -1 where empty */
    uint32_t mask;
    int32_t *ids; /* [columns], class id of each column */
    int32_t width;
    float *sums;      /* [columns], of the patch at hand; 0 between patches */
    int32_t *stamps;  /* [columns], the last patch that had the column */
    int32_t *touched; /* columns of the patch at hand, and one place more */
    uint64_t *best;   /* [k], its largest sums */
    int32_t stamp;
    void *memory;
} Table;

/* Where the results of a patch go. */
typedef struct {
    int32_t *classes; /* [N + 1, k] */
    float *probs;     /* [N + 1, k] */
    float *rest;      /* [N + 1] */
    float *weight;    /* [N] */
    Py_ssize_t k;
} Out;

/* Patches along one axis of the map, as _Span in sampling.py; in cells. */
typedef struct {
    double start, length, low, high;
    Py_ssize_t patches, cells;
    Py_ssize_t *first, *count; /* [patches], the cells that each patch shows */
    double *weights;           /* [patches, cells], from `first` on; sums to 1, or 0 outside */
    double *share;             /* [patches] */
} Axis;

static float from_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u;
    uint32_t fraction = half & 0x3FFu, bits;
    float value;
    if (exponent == 0) {
        value = (float)fraction * 0x1p-24f;
        return sign ? -value : value;
    }
    exponent = exponent == 31 ? 255 : exponent + 112;
    bits = sign | (exponent << 23) | (fraction << 13);
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* ---- the table ---- */

static int open_table(Table *table, Map map, Py_ssize_t cells, Py_ssize_t kept)
{
    size_t entries = (size_t)cells * (size_t)map.k, slots = 16;
    char *next;
    if (entries > INT32_MAX / 4)
        return -1;
    while (slots < 2 * entries)
        slots *= 2;
    next = table->memory = malloc(sizeof(uint64_t) * (size_t)kept + sizeof(int32_t) * (6 * entries + 1 + slots));
    if (!next)
        return -1;
    table->map = map;
    table->best = (uint64_t *)next, next += sizeof(uint64_t) * (size_t)kept;
    table->probs = (float *)next, next += sizeof(float) * entries;
    table->columns = (int32_t *)next, next += sizeof(int32_t) * entries;
    table->ids = (int32_t *)next, next += sizeof(int32_t) * entries;
    table->sums = (float *)next, next += sizeof(float) * entries;
    table->stamps = (int32_t *)next, next += sizeof(int32_t) * entries;
    table->touched = (int32_t *)next, next += sizeof(int32_t) * (entries + 1);
    table->slots = (int32_t *)next;
    table->mask = (uint32_t)slots - 1;
    table->width = 0;
    table->stamp = 0;
    memset(table->columns, -1, sizeof(int32_t) * entries);
    memset(table->slots, -1, sizeof(int32_t) * slots);
    return 0;
}

static int32_t column_of(Table *table, int32_t id)
{
    uint32_t slot = (((uint32_t)id * 2654435769u) >> 7) & table->mask;
    int32_t column;
    while ((column = table->slots[slot]) >= 0) {
        if (table->ids[column] == id)
            return column;
        slot = (slot + 1) & table->mask;
    }
    column = table->width++;
    table->slots[slot] = column;
    table->ids[column] = id;
    table->stamps[column] = -1;
    table->sums[column] = 0;
    return column;
}

/* Softmax of a cell's scores and rest, stable for logits of any size; -inf has probability 0. */
static void meet(Table *table, Py_ssize_t cell)
{
    Py_ssize_t k = table->map.k, i;
    float *probs = table->probs + cell * k, top = table->map.rest[cell], total;
    int32_t *columns = table->columns + cell * k;
    const int32_t *classes = table->map.classes + cell * k;
    for (i = 0; i < k; i++) {
        probs[i] = table->map.is_half ? from_half(((const uint16_t *)table->map.scores)[cell * k + i])
                                      : ((const float *)table->map.scores)[cell * k + i];
        top = probs[i] > top ? probs[i] : top;
        columns[i] = column_of(table, classes[i]);
    }
    total = expf(table->map.rest[cell] - top);
    for (i = 0; i < k; i++)
        total += probs[i] = expf(probs[i] - top);
    for (i = 0; i < k; i++)
        probs[i] /= total;
}

/* Adds a cell to the patch at hand; returns how many columns the patch then has. */
static int32_t add(Table *table, int32_t count, Py_ssize_t cell, double weight)
{
    Py_ssize_t k = table->map.k, i;
    const int32_t *columns = table->columns + cell * k;
    const float *probs = table->probs + cell * k;
    int32_t *stamps = table->stamps, *touched = table->touched, stamp = table->stamp;
    float *sums = table->sums, scale = (float)weight;
    if (columns[0] < 0)
        meet(table, cell);
    for (i = 0; i < k; i++) { /* no branch: none could be predicted */
        int32_t column = columns[i];
        touched[count] = column;
        count += stamps[column] != stamp;
        stamps[column] = stamp;
        sums[column] += scale * probs[i];
    }
    return count;
}

/* The largest sums of the patch at hand; among equals, the smaller class id first. Ends the patch.
 *
 * A sum and its id make one integer in which larger is earlier: positive floats are ordered as their
 * bits are. Sorted by insertion without a branch but the one that most candidates fail.
 */
static void finish(Table *table, int32_t count, const Out *out, Py_ssize_t row)
{
    int32_t *classes = out->classes + row * out->k;
    float *probs = out->probs + row * out->k;
    uint64_t *best = table->best;
    Py_ssize_t k = out->k, i;
    double mass = 0;
    int32_t n;
    memset(best, 0, sizeof *best * (size_t)k);
    for (n = 0; n < count; n++) {
        int32_t column = table->touched[n];
        uint64_t entry;
        uint32_t bits;
        memcpy(&bits, table->sums + column, sizeof bits);
        table->sums[column] = 0;
        entry = (uint64_t)bits << 32 | (UINT32_MAX - (uint32_t)table->ids[column]);
        if (entry <= best[k - 1])
            continue;
        for (i = k - 1; i > 0; i--) {
            uint64_t other = best[i - 1] < entry ? best[i - 1] : entry;
            best[i] = best[i] > other ? best[i] : other;
        }
        best[0] = best[0] > entry ? best[0] : entry;
    }
    for (i = 0; i < k; i++) {
        uint32_t bits = (uint32_t)(best[i] >> 32);
        memcpy(probs + i, &bits, sizeof bits);
        classes[i] = bits ? (int32_t)(UINT32_MAX - (uint32_t)best[i]) : 0;
        mass += probs[i];
    }
    out->rest[row] = mass < 1 ? (float)(1 - mass) : 0;
    table->stamp++;
}

/* ---- upright paths: exact weights, a product of one for rows and one for columns ---- */

static double hat(double x)
{
    x = x < -1 ? -1 : x > 1 ? 1 : x;
    return x - 0.5 * x * fabs(x); /* integral of 1 - |x|, up to a constant */
}

static double step(double x)
{
    return x < 0 ? 0 : x > 1 ? 1 : x;
}

static double within(double x, double low, double high)
{
    return x < low ? low : x > high ? high : x;
}

static int weigh(Axis *axis, int nearest)
{
    Py_ssize_t n = axis->patches, cells = axis->cells, i, j;
    axis->weights = calloc((size_t)(n * cells), sizeof(double));
    axis->share = calloc((size_t)n, sizeof(double));
    axis->first = calloc((size_t)(2 * n), sizeof(Py_ssize_t));
    if (!axis->weights || !axis->share || !axis->first)
        return -1;
    axis->count = axis->first + n;
    for (i = 0; i < n; i++) {
        double *weights = axis->weights + i * cells, sum = 0;
        double p = within(axis->start + i * (axis->length / n), axis->low, axis->high);
        double q = within(axis->start + (i + 1) * (axis->length / n), axis->low, axis->high);
        double from = p < q ? p : q, to = p < q ? q : p;
        /* A kernel reaches half a cell beyond its own. Beyond its border, a map goes on as its
         * outermost cell: one cell more on either side counts to the border. */
        Py_ssize_t begin = (Py_ssize_t)floor(from - 0.5), end = (Py_ssize_t)ceil(to + 0.5);
        begin = begin < 0 ? 0 : begin;
        end = end > cells ? cells : end;
        axis->first[i] = begin;
        axis->count[i] = end > begin ? end - begin : 0;
        for (j = nearest ? begin : begin - 1; j < (nearest ? end : end + 1); j++) {
            Py_ssize_t cell = j < begin ? begin : j >= end ? end - 1 : j;
            double weight = nearest ? step(to - j) - step(from - j)
                                    : hat(to - j - 0.5) - hat(from - j - 0.5);
            /* Inside the map a kernel beyond the range does not reach the patch. */
            if (axis->count[i]) {
                weights[cell - begin] += weight;
                sum += weight;
            }
        }
        axis->share[i] = sum * n / fabs(axis->length);
        if (axis->share[i] < NOTHING) {
            axis->share[i] = 0;
            axis->count[i] = 0;
            continue;
        }
        for (j = 0; j < axis->count[i]; j++)
            weights[j] /= sum;
    }
    return 0;
}

/* How much each cell of an axis counts in all patches together, weighted by their shares. */
static double *totals(const Axis *axis)
{
    double *total = calloc((size_t)axis->cells, sizeof(double)), sum = 0;
    Py_ssize_t i, j;
    if (!total)
        return NULL;
    for (i = 0; i < axis->patches; i++)
        sum += axis->share[i];
    for (i = 0; sum > 0 && i < axis->patches; i++)
        for (j = 0; j < axis->count[i]; j++)
            total[axis->first[i] + j] +=
                axis->share[i] / sum * axis->weights[i * axis->cells + j];
    return total;
}

static int upright(Table *table, Axis *y, Axis *x, int transposed, const Out *out)
{
    Py_ssize_t i, j, r, c, rows = y->cells, columns = x->cells;
    double *down = totals(y), *across = totals(x);
    int32_t count = 0;
    if (down && across) {
        for (i = 0; i < y->patches; i++) {
            const double *wy = y->weights + i * rows;
            for (j = 0; j < x->patches; j++) {
                const double *wx = x->weights + j * columns;
                Py_ssize_t row = transposed ? j * y->patches + i : i * x->patches + j;
                count = 0;
                for (r = 0; r < y->count[i]; r++)
                    for (c = 0; c < x->count[j]; c++)
                        if (wy[r] * wx[c] > 0)
                            count = add(table, count,
                                        (y->first[i] + r) * columns + x->first[j] + c,
                                        wy[r] * wx[c]);
                finish(table, count, out, row);
                out->weight[row] = (float)(y->share[i] * x->share[j]);
            }
        }
        count = 0;
        for (r = 0; r < rows; r++)
            for (c = 0; c < columns; c++)
                if (down[r] * across[c] > 0)
                    count = add(table, count, r * columns + c, down[r] * across[c]);
        finish(table, count, out, y->patches * x->patches);
    }
    free(down);
    free(across);
    return down && across ? 0 : -1;
}

/* ---- other paths: weights of single cells, as runs of entries, one run a patch ---- */

static int scattered(Table *table, const int64_t *cells, const float *weights,
                     const int64_t *offsets, const double *share, Py_ssize_t patches,
                     Py_ssize_t entries, Py_ssize_t map_cells, const Out *out)
{
    double *total = calloc((size_t)map_cells, sizeof(double)), sum = 0;
    Py_ssize_t i, e;
    int32_t count;
    if (!total)
        return -1;
    for (i = 0; i < patches; i++)
        sum += share[i];
    for (i = 0; i < patches; i++) {
        Py_ssize_t end = i + 1 < patches ? offsets[i + 1] : entries;
        count = 0;
        for (e = offsets[i]; e < end; e++) {
            count = add(table, count, cells[e], weights[e]);
            total[cells[e]] += share[i] / sum * weights[e];
        }
        finish(table, count, out, i);
        out->weight[i] = (float)share[i];
    }
    count = 0;
    for (i = 0; i < map_cells; i++)
        if (total[i] > 0)
            count = add(table, count, i, total[i]);
    finish(table, count, out, patches);
    free(total);
    return 0;
}

/* ---- Python ---- */

typedef struct {
    Py_buffer scores, classes, rest, out_classes, out_probs, out_rest, out_weight;
} Buffers;

static void release(Buffers *buffers)
{
    Py_buffer *all = (Py_buffer *)buffers;
    size_t i;
    for (i = 0; i < sizeof *buffers / sizeof *all; i++)
        PyBuffer_Release(all + i);
}

/* Map and results from the buffers; their sizes must agree, or nothing here could be trusted. */
static int understand(const Buffers *b, Py_ssize_t k, Py_ssize_t cells, Py_ssize_t patches,
                      Map *map, Out *out)
{
    Py_ssize_t entries = b->classes.len / 4;
    int fits = cells > 0 && patches > 0 && k > 0 && entries > 0 && entries % cells == 0;
    fits = fits && b->rest.len == 4 * cells;
    fits = fits && (b->scores.len == 2 * entries || b->scores.len == 4 * entries);
    fits = fits && b->out_classes.len == 4 * k * (patches + 1);
    fits = fits && b->out_probs.len == b->out_classes.len;
    fits = fits && b->out_rest.len == 4 * (patches + 1) && b->out_weight.len == 4 * patches;
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit together");
        return -1;
    }
    *map = (Map){b->scores.buf, b->classes.buf, b->rest.buf, entries / cells,
                 b->scores.len == 2 * entries};
    *out = (Out){b->out_classes.buf, b->out_probs.buf, b->out_rest.buf, b->out_weight.buf, k};
    return 0;
}

static PyObject *merge_upright(PyObject *self, PyObject *args)
{
    Buffers b;
    Axis y = {0}, x = {0};
    Map map;
    Out out;
    Table table = {0};
    Py_ssize_t k;
    int transposed, nearest, failed = 1;
    if (!PyArg_ParseTuple(args, "y*y*y*w*w*w*w*n(ddnndd)(ddnndd)pp", &b.scores, &b.classes, &b.rest,
                          &b.out_classes, &b.out_probs, &b.out_rest, &b.out_weight, &k, &y.start,
                          &y.length, &y.patches, &y.cells, &y.low, &y.high, &x.start, &x.length,
                          &x.patches, &x.cells, &x.low, &x.high, &transposed, &nearest))
        return NULL;
    if (y.patches > 0 && x.patches > 0 && y.cells > 0 && x.cells > 0 &&
        y.cells <= b.rest.len && x.cells <= b.rest.len && y.patches <= b.out_rest.len &&
        x.patches <= b.out_rest.len) {
        if (understand(&b, k, y.cells * x.cells, y.patches * x.patches, &map, &out) == 0) {
            Py_BEGIN_ALLOW_THREADS
            failed = open_table(&table, map, y.cells * x.cells, k) || weigh(&y, nearest) ||
                     weigh(&x, nearest) || upright(&table, &y, &x, transposed, &out);
            free(table.memory);
            free(y.weights), free(y.share), free(y.first);
            free(x.weights), free(x.share), free(x.first);
            Py_END_ALLOW_THREADS
            if (failed)
                PyErr_NoMemory();
        }
    } else
        PyErr_SetString(PyExc_ValueError, "spans that do not fit the arrays");
    release(&b);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *merge_scattered(PyObject *self, PyObject *args)
{
    Buffers b;
    Py_buffer cells, weights, offsets, share;
    Map map;
    Out out;
    Table table = {0};
    Py_ssize_t k, i, entries, patches, map_cells;
    int fits, failed = 1;
    if (!PyArg_ParseTuple(args, "y*y*y*w*w*w*w*ny*y*y*y*", &b.scores, &b.classes, &b.rest,
                          &b.out_classes, &b.out_probs, &b.out_rest, &b.out_weight, &k, &cells,
                          &weights, &offsets, &share))
        return NULL;
    entries = cells.len / 8, patches = share.len / 8, map_cells = b.rest.len / 4;
    fits = weights.len == 4 * entries && offsets.len == share.len;
    for (i = 0; fits && i < entries; i++)
        fits = ((int64_t *)cells.buf)[i] >= 0 && ((int64_t *)cells.buf)[i] < map_cells;
    for (i = 0; fits && i < patches; i++) {
        int64_t from = ((int64_t *)offsets.buf)[i];
        fits = from >= (i ? ((int64_t *)offsets.buf)[i - 1] : 0) && from <= entries;
    }
    if (!fits)
        PyErr_SetString(PyExc_ValueError, "entries that do not fit the map");
    else if (understand(&b, k, map_cells, patches, &map, &out) == 0) {
        Py_BEGIN_ALLOW_THREADS
        failed = open_table(&table, map, map_cells, k) ||
                 scattered(&table, cells.buf, weights.buf, offsets.buf, share.buf, patches, entries,
                           map_cells, &out);
        free(table.memory);
        Py_END_ALLOW_THREADS
        if (failed)
            PyErr_NoMemory();
    }
    PyBuffer_Release(&cells), PyBuffer_Release(&weights);
    PyBuffer_Release(&offsets), PyBuffer_Release(&share);
    release(&b);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

/* Whether each cell has a finite logit, and none NaN or +inf. */
static PyObject *merge_usable(PyObject *self, PyObject *args)
{
    Py_buffer scores, rest;
    Py_ssize_t cells, k, i, j;
    int good = 1, fits, is_half;
    if (!PyArg_ParseTuple(args, "y*y*n", &scores, &rest, &k))
        return NULL;
    cells = rest.len / 4;
    is_half = k > 0 && scores.len / k == 2 * cells;
    fits = k > 0 && scores.len == cells * k * (is_half ? 2 : 4);
    for (i = 0; fits && good && i < cells; i++) {
        const float *stored = (const float *)scores.buf + i * k;
        const uint16_t *halves = (const uint16_t *)scores.buf + i * k;
        float other = ((const float *)rest.buf)[i];
        int some = isfinite(other);
        good = some || other < 0; /* -inf is no mass; of NaN, no comparison holds */
        for (j = 0; j < k; j++) {
            float value = is_half ? from_half(halves[j]) : stored[j];
            some |= isfinite(value);
            good &= isfinite(value) || value < 0;
        }
        good &= some;
    }
    PyBuffer_Release(&scores), PyBuffer_Release(&rest);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit together");
        return NULL;
    }
    return PyBool_FromLong(good);
}

/* Items of `width` bytes from all their first bytes, then all their second bytes and so on. */
static PyObject *merge_unshuffle(PyObject *self, PyObject *args)
{
    Py_buffer from, to;
    Py_ssize_t width, count, i, j;
    if (!PyArg_ParseTuple(args, "y*w*n", &from, &to, &width))
        return NULL;
    if (width > 0 && from.len == to.len && from.len % width == 0) {
        const unsigned char *source = from.buf;
        unsigned char *target = to.buf;
        count = from.len / width;
        if (width == 2)
            for (i = 0; i < count; i++) {
                target[2 * i] = source[i];
                target[2 * i + 1] = source[count + i];
            }
        else
            for (j = 0; j < width; j++)
                for (i = 0; i < count; i++)
                    target[i * width + j] = source[j * count + i];
    } else
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit together");
    PyBuffer_Release(&from), PyBuffer_Release(&to);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"upright", merge_upright, METH_VARARGS,
     "upright(scores, classes, rest, out_classes, out_probs, out_rest, out_weight, k, along_y, "
     "along_x, transposed, nearest)\n\nExact averages where the picture's path is upright."},
    {"scattered", merge_scattered, METH_VARARGS,
     "scattered(scores, classes, rest, out_classes, out_probs, out_rest, out_weight, k, cells, "
     "weights, offsets, share)\n\nAverages with given weights of single cells."},
    {"usable", merge_usable, METH_VARARGS,
     "usable(scores, rest, k)\n\nWhether each cell has a finite logit, and none NaN or +inf."},
    {"unshuffle", merge_unshuffle, METH_VARARGS,
     "unshuffle(data, out, width)\n\nUndo HDF5's byte shuffle of items of `width` bytes."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_merge",
    .m_doc = "Sparse averages of a score map over patches.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__merge(void)
{
    return PyModuleDef_Init(&definition);
}
