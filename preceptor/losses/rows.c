/* Divergences row by row on a CPU: the values and gradients of rows.py, in a few passes that stay in cache.

   A row of student logits (and of teacher logits) is read once into float scratch, worked on there, and its gradient is
   written over the student's logits. Sums run in float over short blocks, and in double over the blocks. Built without
   -ffast-math: infinities and NaN behave as IEEE 754 says. s = log q is the student, t = log p the teacher, d = t - s,
   and u are logits over the temperature. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, SKEW_KL, SKEW_REVERSE_KL, TOTAL_VARIATION };
enum { NO_TEACHER, DENSE, BUCKET, SAMPLED };
enum { FLOAT32, BFLOAT16 };
enum { BLOCK = 1024, IGNORED = -100, STATS = 5 };

typedef struct {
    int64_t vocabulary, k;
    int32_t kind, mode, student_type, teacher_type, gradient, cross_entropy;
    float mix, temperature, gain, label_gain;
    float student_scale, student_cap, teacher_scale, teacher_cap; /* a cap of 0 is none */
} Job;

typedef struct {
    float *u, *t, *q, *a; /* student logits, teacher logits, probabilities, gradient so far: (vocabulary + 1) each */
} Scratch;

static inline float as_float(uint32_t i) {
    float f;
    memcpy(&f, &i, 4);
    return f;
}

static inline uint32_t as_bits(float f) {
    uint32_t i;
    memcpy(&i, &f, 4);
    return i;
}

/* exp for x <= 88, to 1e-7; 0 below the smallest normal number; NaN stays NaN. Polynomial: Cephes expf. */
static inline float fast_exp(float x) {
    float in = x < -87.3f ? -87.3f : x;
    float shifted = in * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
    float r = (in - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    y *= as_float((as_bits(shifted) << 23) + 0x3f800000u);
    return x < -87.3f ? 0.0f : y;
}

/* log(1 + less) for -1 <= less <= 0, exact to 1e-7 relative near 0 too. Polynomial: Cephes logf. */
static inline float fast_log1p(float less) {
    float one = 1.0f + less;
    one = one < 1.17549435e-38f ? 1.17549435e-38f : one;
    uint32_t i = as_bits(one) - 0x3f3504f3u;
    float n = (float)((int32_t)i >> 23), m = as_float((i & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    m = n == 0.0f ? less : m;
    float z = m * m, y = 7.0376836292e-2f;
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * z - n * 2.12194440e-4f - 0.5f * z;
    return (m + y) + n * 0.693359375f;
}

static inline float fast_tanh(float x) {
    float a = fabsf(x), e = fast_exp(-2.0f * a), z = x * x;
    float near = x - x * z * (0.333333333f - z * (0.133333333f - z * (0.0539682540f - z * 0.0218694885f)));
    return a < 0.2f ? near : copysignf((1.0f - e) / (1.0f + e), x);
}

/* Products as u = softcap(scale * product) / temperature; returns the maximum. */
static float read_row(const void *from, int type, int64_t n, float scale, float cap, float temperature, float *u) {
    const float *wide = from, by = cap == 0.0f ? scale / temperature : scale / cap;
    const uint16_t *narrow = from;
    float top = -INFINITY;
    if (type == FLOAT32) {
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < n; i++) {
            u[i] = wide[i] * by;
            top = u[i] > top ? u[i] : top;
        }
    } else {
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < n; i++) {
            u[i] = as_float((uint32_t)narrow[i] << 16) * by;
            top = u[i] > top ? u[i] : top;
        }
    }
    if (cap == 0.0f) return top;
    const float out = cap / temperature;
    top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) {
        u[i] = out * fast_tanh(u[i]);
        top = u[i] > top ? u[i] : top;
    }
    return top;
}

static int64_t first_at(const float *u, int64_t n, float top) {
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t end = start + BLOCK < n ? start + BLOCK : n;
        int32_t found = 0;
#pragma omp simd reduction(| : found)
        for (int64_t i = start; i < end; i++) found |= u[i] == top;
        for (int64_t i = start; found && i < end; i++)
            if (u[i] == top) return i;
    }
    return 0;
}

/* Sum of exp(x) and of x exp(x) with x = factor * u - top. */
static void exp_sums(const float *u, int64_t n, float factor, float top, double *sum, double *weighted) {
    *sum = *weighted = 0.0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t end = start + BLOCK < n ? start + BLOCK : n;
        float total = 0.0f, moment = 0.0f;
#pragma omp simd reduction(+ : total, moment)
        for (int64_t i = start; i < end; i++) {
            float x = u[i] * factor - top, e = fast_exp(x);
            total += e;
            moment += e == 0.0f ? 0.0f : e * x;
        }
        *sum += total;
        *weighted += moment;
    }
}

/* Compares n classes of one kind. Leaves q in q and gain * q * dD/dq in a; sums: value, q * dD/dq, q, p.
   With h the larger side, l = log(m / h) comes from exp(-|d|) alone, so close sides lose no digits. */
static inline __attribute__((always_inline)) void compare(int kind, float mix, float gain, int64_t n, const float *us,
                                                          double cs, const float *ut, double ct, float *qs, float *as,
                                                          double *sums) {
    const float share = kind == SKEW_REVERSE_KL ? 1.0f - mix : mix, keep = 1.0f - mix;
    /* A normaliser in two parts: one float would lose what logits of thousands leave of a probability. */
    const float student = (float)cs, teacher = (float)ct, apart = (float)(ct - cs);
    const float student_rest = (float)(cs - student), teacher_rest = (float)(ct - teacher);
    sums[0] = sums[1] = sums[2] = sums[3] = 0.0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t end = start + BLOCK < n ? start + BLOCK : n;
        float values = 0.0f, slopes = 0.0f, q_sum = 0.0f, p_sum = 0.0f;
#pragma omp simd reduction(+ : values, slopes, q_sum, p_sum)
        for (int64_t i = start; i < end; i++) {
            float d = (ut[i] - us[i]) - apart;
            d = us[i] == -INFINITY && ut[i] == -INFINITY ? 0.0f : d;
            float high = fast_exp(d > 0.0f ? (ut[i] - teacher) - teacher_rest : (us[i] - student) - student_rest);
            float e = fast_exp(d > 0.0f ? -d : d), low = high * e;
            float q = d > 0.0f ? low : high, p = d > 0.0f ? high : low, value = 0.0f, slope = 0.0f;
            if (kind == FORWARD_KL) {
                value = p == 0.0f ? 0.0f : p * d;
                slope = -p;
            } else if (kind == REVERSE_KL) {
                value = slope = q == 0.0f ? 0.0f : -q * d;
            } else if (kind == TOTAL_VARIATION) {
                float half = 0.5f * (q - p);
                value = fabsf(half);
                slope = half == 0.0f ? 0.0f : copysignf(0.5f * q, half);
            } else {
                float less = (d > 0.0f ? 1.0f - share : share) * (e - 1.0f), l = fast_log1p(less);
                float over = 1.0f + less < 1.17549435e-38f ? 1.17549435e-38f : 1.0f + less;
                float p_log = d > 0.0f ? -l : d - l, q_log = d > 0.0f ? -d - l : -l;
                p_log = p == 0.0f ? 0.0f : p * p_log;
                q_log = q == 0.0f ? 0.0f : q * q_log;
                if (kind == JENSEN_SHANNON) {
                    slope = keep * q_log;
                    value = share * p_log + slope;
                } else if (kind == SKEW_KL) {
                    value = p_log;
                    slope = -keep * low / over;
                } else {
                    value = q_log;
                    slope = q_log - mix * q * (d > 0.0f ? e : 1.0f) / over;
                }
            }
            values += value;
            slopes += slope;
            q_sum += q;
            p_sum += p;
            qs[i] = q;
            as[i] = gain * slope;
        }
        sums[0] += values;
        sums[1] += slopes;
        sums[2] += q_sum;
        sums[3] += p_sum;
    }
    /* 0 in exact arithmetic: cancels to first order what rounded normalisers do to the value. */
    double excess = sums[2] - sums[3];
    if (kind == FORWARD_KL) sums[0] += excess;
    if (kind == REVERSE_KL) sums[0] -= excess;
    if (kind == SKEW_KL) sums[0] += keep * excess;
    if (kind == SKEW_REVERSE_KL) sums[0] -= keep * excess;
}

static void compare_kind(const Job *job, int64_t n, const float *us, double cs, const float *ut, double ct, float *qs,
                         float *as, double *sums) {
    const float mix = job->mix, gain = job->gain / job->temperature;
    switch (job->kind) {
    case FORWARD_KL: compare(FORWARD_KL, mix, gain, n, us, cs, ut, ct, qs, as, sums); break;
    case REVERSE_KL: compare(REVERSE_KL, mix, gain, n, us, cs, ut, ct, qs, as, sums); break;
    case JENSEN_SHANNON: compare(JENSEN_SHANNON, mix, gain, n, us, cs, ut, ct, qs, as, sums); break;
    case SKEW_KL: compare(SKEW_KL, mix, gain, n, us, cs, ut, ct, qs, as, sums); break;
    case SKEW_REVERSE_KL: compare(SKEW_REVERSE_KL, mix, gain, n, us, cs, ut, ct, qs, as, sums); break;
    default: compare(TOTAL_VARIATION, mix, gain, n, us, cs, ut, ct, qs, as, sums);
    }
}

/* exp(u - c) into q. */
static void probabilities(const float *u, int64_t n, double c, float *q) {
    const float by = (float)c, rest = (float)(c - by);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) q[i] = fast_exp((u[i] - by) - rest);
}

/* out = (a + gain_q * q + gain_one * softmax at temperature 1) * curve of the softcap * scale. */
static void write_row(const Job *job, int64_t n, const Scratch *x, float gain_q, float gain_one, double log_one,
                      void *out) {
    const float heat = job->temperature, scale = job->student_scale, by = (float)log_one;
    const float rest = (float)(log_one - by);
    float *a = x->a;
    const float *q = x->q, *u = x->u;
    if (gain_one != 0.0f) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) a[i] += gain_one * fast_exp((u[i] * heat - by) - rest);
    }
    if (job->student_cap != 0.0f) {
        const float in = heat / job->student_cap;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float bent = u[i] * in;
            a[i] = (a[i] + gain_q * q[i]) * (1.0f - bent * bent);
        }
        gain_q = 0.0f;
    }
    if (job->student_type == FLOAT32) {
        float *wide = out;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) wide[i] = (a[i] + gain_q * q[i]) * scale;
    } else {
        uint16_t *narrow = out;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float g = (a[i] + gain_q * q[i]) * scale;
            uint32_t raw = as_bits(g), even = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
            narrow[i] = (uint16_t)(g != g ? 0x7fc0u : even);
        }
    }
}

/* log of the sum of exp(u - top) where everything underflows. */
static double faint_log_sum(const float *u, int64_t n, float top) {
    float high = -INFINITY;
    double sum, moment;
    for (int64_t i = 0; i < n; i++) high = u[i] > high ? u[i] : high;
    if (high == -INFINITY) return -INFINITY;
    exp_sums(u, n, 1.0f, high, &sum, &moment);
    return log(sum) + ((double)high - top);
}

/* Top-k targets: the k listed classes and one for all others. Leaves the listed tokens' gradients in a. Unlisted tokens
   share the result, each by its part exp(u - *inside) of the others. */
static float bucket(const Job *job, const Scratch *x, float top, const int64_t *ids, const float *values, double *c,
                    double *inside, double *stats) {
    const int64_t n = job->vocabulary, k = job->k;
    float *us = x->t, *ut = us + k + 1, *q = ut + k + 1, *a = q + k + 1;
    double rest, moment, listed = 0.0, sums[4];
    int64_t best = 0;
    for (int64_t j = 0; j < k; j++) {
        int used = values[j] > -INFINITY;
        us[j] = used ? x->u[ids[j]] - top : -INFINITY;
        ut[j] = values[j];
        a[j] = x->u[ids[j]];
        best = values[j] > values[best] ? j : best;
    }
    for (int64_t j = 0; j < k; j++)
        if (values[j] > -INFINITY) x->u[ids[j]] = -INFINITY;
    exp_sums(x->u, n, 1.0f, top, &rest, &moment);
    double log_rest = log(rest);
    if (rest < 1e-30) log_rest = faint_log_sum(x->u, n, top);
    for (int64_t j = 0; j < k; j++)
        if (values[j] > -INFINITY) x->u[ids[j]] = a[j];
    for (int64_t j = 0; j < k; j++) {
        double e = us[j] > -INFINITY ? exp((double)us[j]) : 0.0;
        listed += e;
        moment += e > 0.0 ? e * us[j] : 0.0;
    }
    *c = log(rest + listed);
    stats[2] = *c - moment / (rest + listed);
    us[k] = (float)log_rest;
    ut[k] = values[k];
    compare_kind(job, k + 1, us, *c, ut, 0.0, q, a, sums);
    stats[0] = sums[0];
    const float gain = job->gain / job->temperature, towards = -gain * (float)sums[1];
    for (int64_t j = 0; j <= k; j++) a[j] += towards * q[j];
    for (int64_t j = 0; j < k; j++)
        if (values[j] > -INFINITY) x->a[ids[j]] += a[j];
    stats[4] = ids[best] == first_at(x->u, n, top);
    *c += top;
    *inside = log_rest == -INFINITY ? *c : log_rest + top;
    return log_rest == -INFINITY ? 0.0f : a[k];
}

static void one_row(const Job *job, const Scratch *x, void *student, const void *teacher, const int64_t *ids,
                    const float *values, const int64_t *label, double *stats) {
    const int64_t n = job->vocabulary;
    const float heat = job->temperature;
    double sum, moment, c, inside, sums[4];
    float gain_q = 0.0f, gain_one = 0.0f;
    float top = read_row(student, job->student_type, n, job->student_scale, job->student_cap, heat, x->u);
    if (job->mode != DENSE) memset(x->a, 0, (size_t)n * sizeof(float));
    if (job->mode == BUCKET) {
        gain_q = bucket(job, x, top, ids, values, &c, &inside, stats);
    } else {
        exp_sums(x->u, n, 1.0f, top, &sum, &moment);
        stats[2] = log(sum) - moment / sum;
        inside = c = log(sum) + top;
    }
    if (job->mode == DENSE) {
        float best = read_row(teacher, job->teacher_type, n, job->teacher_scale, job->teacher_cap, heat, x->t);
        exp_sums(x->t, n, 1.0f, best, &sum, &moment);
        stats[3] = log(sum) - moment / sum;
        compare_kind(job, n, x->u, c, x->t, log(sum) + best, x->q, x->a, sums);
        stats[0] = sums[0];
        gain_q = -job->gain / heat * (float)sums[1];
        stats[4] = first_at(x->u, n, top) == first_at(x->t, n, best);
    } else if (job->mode == SAMPLED) {
        for (int64_t j = 0; j < job->k; j++) {
            if (values[j] == 0.0f) continue;
            stats[0] += values[j] * (c - x->u[ids[j]]);
            gain_q += job->gain / heat * values[j];
            x->a[ids[j]] -= job->gain / heat * values[j];
        }
    }
    double one = c;
    if (job->cross_entropy && *label != IGNORED) {
        if (heat != 1.0f) {
            exp_sums(x->u, n, heat, top * heat, &sum, &moment);
            one = log(sum) + (double)top * heat;
        }
        if (heat != 1.0f || job->mode == BUCKET)
            gain_one = job->label_gain;
        else
            gain_q += job->label_gain;
        stats[1] = one - (double)x->u[*label] * heat;
        x->a[*label] -= job->label_gain;
    }
    if (!job->gradient) return;
    if (job->mode != DENSE) probabilities(x->u, n, inside, x->q);
    for (int64_t j = 0; job->mode == BUCKET && j < job->k; j++)
        if (values[j] > -INFINITY) x->q[ids[j]] = 0.0f;
    write_row(job, n, x, gain_q, gain_one, one, student);
}

/* Rows [first, last) of a block; `values` holds k + 1 numbers a row for top-k targets (the last is the tail's) and k for
   samples. Statistics are added to `stats` (rows, 5), in the order of rows.STATS. Returns 0, or 1 without memory. */
int divergence_rows(const Job *job, int64_t first, int64_t last, char *student, const char *teacher, const int64_t *ids,
                    const float *values, const int64_t *labels, double *stats) {
    const int64_t n = job->vocabulary, padded = ((n > 4 * (job->k + 1) ? n : 4 * (job->k + 1)) + 63) / 16 * 16;
    const size_t wide = job->student_type == FLOAT32 ? 4 : 2, said_wide = job->teacher_type == FLOAT32 ? 4 : 2;
    const int64_t width = job->mode == BUCKET ? job->k + 1 : job->k;
    float *memory = aligned_alloc(64, (size_t)padded * 4 * sizeof(float));
    if (memory == NULL) return 1;
    const Scratch x = {memory, memory + padded, memory + 2 * padded, memory + 3 * padded};
    for (int64_t i = first; i < last; i++)
        one_row(job, &x, student + (size_t)(i * n) * wide, teacher ? teacher + (size_t)(i * n) * said_wide : NULL,
                ids ? ids + i * job->k : NULL, values ? values + i * width : NULL, labels ? labels + i : NULL,
                stats + i * STATS);
    free(memory);
    return 0;
}
