using { steersman.test as db } from '../db/schema';

@path: '/odata/v4/orders'
service OrderService {
  @readonly entity A_SalesOrder as projection on db.SalesOrders;
  @readonly entity A_Customer   as projection on db.Customers;
}
