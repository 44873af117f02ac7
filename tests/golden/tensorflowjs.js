// Runs TensorFlow.js' RMSProp. Its arguments and the first parameters are a line of JSON on stdin; each later line has
// the learning rate and the gradients of a step, and is answered with the parameters after it.
const tf = require('@tensorflow/tfjs');

const lines = require('readline').createInterface({input: process.stdin});
let optimizer, params;

lines.on('line', (line) => {
  const message = JSON.parse(line);
  if (optimizer === undefined) {
    optimizer = tf.train.rmsprop(...message.arguments);
    params = Object.fromEntries(
        Object.entries(message.params).map(([name, values]) => [name, tf.variable(tf.tensor1d(values), true, name)]));
    return;
  }
  optimizer.learningRate = message.rate;
  optimizer.applyGradients(
      Object.fromEntries(Object.entries(message.grads).map(([name, values]) => [name, tf.tensor1d(values)])));
  const values = Object.fromEntries(Object.entries(params).map(([name, p]) => [name, Array.from(p.dataSync())]));
  process.stdout.write(JSON.stringify(values) + '\n');
});
